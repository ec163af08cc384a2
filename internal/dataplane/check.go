// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// Feature is something that the dataplane uses of the kernel.
type Feature struct {
	Name      string
	Present   bool
	Essential bool   // without it nothing works
	Problem   string // why it is thought missing
	Without   string // what is lost
	Remedy    string
}

// Check tries every feature by loading or making something small, never by
// the kernel's version. Interfaces are those that shall carry XDP.
func Check(interfaces []string) []Feature {
	found := []Feature{
		feature("BPF programs and maps", loadNothing, true, "nothing works", "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"),
		feature("XDP with multi-buffer frames", loadFrags, true, "the XDP program cannot be loaded", "use Linux 6.1 or later"),
		feature("memory-mapped arrays", makeMappable, true, "maps cannot change under traffic", "use Linux 6.1 or later"),
		feature("longest-prefix tries", func() error { return features.HaveMapType(ebpf.LPMTrie) }, true, "tunnels cannot be checked", "use Linux 6.1 or later"),
		feature("LRU hash maps", func() error { return features.HaveMapType(ebpf.LRUHash) }, true, "flows cannot be bounded", "use Linux 6.1 or later"),
		feature("bpf_timer", func() error { return features.HaveProgramHelper(ebpf.XDP, asm.FnTimerInit) }, true, "flows do not expire", "use Linux 6.1 or later"),
		feature("bpf_fib_lookup", func() error { return features.HaveProgramHelper(ebpf.XDP, asm.FnFibLookup) }, true, "packets wait for next hops to be resolved", "build the kernel with CONFIG_INET"),
		feature("bpf_redirect_neigh", func() error { return features.HaveProgramHelper(ebpf.SchedCLS, asm.FnRedirectNeigh) }, true, "UDP answers of Pods do not leave as the VIP", "use Linux 6.1 or later"),
		feature("SYN cookies in XDP", func() error { return features.HaveProgramHelper(ebpf.XDP, asm.FnTcpRawGenSyncookieIpv4) }, true, "the program cannot be loaded", "use Linux 6.1 or later"),
		feature("the programs of both roles", loadAll, true, "nothing works", "use Linux 6.1 or later; see the kernel's message"),
		feature("tcx", haveTCX, false, "tc programs are attached by clsact filters instead, replaced in place", "use Linux 6.6 or later"),
	}
	for _, name := range interfaces {
		found = append(found, feature("native XDP on "+name, func() error { return tryXDP(name) }, false,
			"generic XDP is several times slower; it needs genericXDP: true", "use a driver with native XDP, or lower the MTU"))
	}
	return found
}

func feature(name string, try func() error, essential bool, without, remedy string) Feature {
	f := Feature{Name: name, Essential: essential, Without: without, Remedy: remedy}
	if err := try(); err != nil {
		f.Problem = err.Error()
		return f
	}
	f.Present = true
	return f
}

func pass(flags uint32) *ebpf.ProgramSpec {
	return &ebpf.ProgramSpec{Type: ebpf.XDP, License: "Dual BSD/GPL", Flags: flags,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2 /* XDP_PASS */), asm.Return()}}
}

func load(spec *ebpf.ProgramSpec) error {
	program, err := ebpf.NewProgram(spec)
	if err != nil {
		return err
	}
	return program.Close()
}

func loadNothing() error { return load(pass(0)) }

func loadFrags() error { return load(pass(1 << 5)) } // BPF_F_XDP_HAS_FRAGS

func makeMappable() error {
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1, Flags: 1 << 10 /* BPF_F_MMAPABLE */})
	if err != nil {
		return err
	}
	return m.Close()
}

func loadAll() error {
	spec, err := loadBpf()
	if err != nil {
		return err
	}
	if err := spec.Variables["config"].Set(bpfConfig{Lb: 1, Backend: 1}); err != nil {
		return err
	}
	var o bpfObjects
	if err := spec.LoadAndAssign(&o, nil); err != nil {
		return err
	}
	return o.Close()
}

// haveTCX attaches a program that decides nothing to the loopback device for a
// moment.
func haveTCX() error {
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}})
	if err != nil {
		return err
	}
	defer program.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: 1, Program: program, Attach: ebpf.AttachTCXIngress})
	if err != nil {
		return err
	}
	return l.Close()
}

// tryXDP attaches a pass program for a moment, unless there is one already.
func tryXDP(name string) error {
	device, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if xdp := device.Attrs().Xdp; xdp != nil && xdp.Attached {
		if xdp.AttachMode == 2 {
			return errors.New("it carries generic XDP")
		}
		return nil
	}
	program, err := ebpf.NewProgram(pass(1 << 5))
	if err != nil {
		return err
	}
	defer program.Close()
	l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: device.Attrs().Index, Flags: link.XDPDriverMode})
	if err != nil {
		return err
	}
	return l.Close()
}
