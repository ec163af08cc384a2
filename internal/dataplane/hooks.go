// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// hooks are the places where programs are attached. Each is a pinned link
// that is updated in place; nothing is ever detached to be attached again.
type hooks struct {
	config Config
	links  map[string]link.Link // by the name of the pin
	clsact map[string]bool      // hooks on kernels without tcx
}

func newHooks(cfg Config) *hooks {
	return &hooks{config: cfg, links: map[string]link.Link{}, clsact: map[string]bool{}}
}

// set attaches what the node's roles need, and detaches from Pods' devices
// that are no longer wanted.
func (h *hooks) set(loaded *objects, want Desired) error {
	for _, name := range h.config.Interfaces {
		device, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("interfaces: %s: %w; name devices that exist", name, err)
		}
		if err := h.attachXDP(device, loaded.FairleadXdp); err != nil {
			return err
		}
		if want.Plan.Backend {
			if err := h.attachTC(device.Attrs().Index, "egress-"+name, loaded.FairleadEgress, ebpf.AttachTCXEgress); err != nil {
				return err
			}
		}
	}
	wanted := map[string]bool{}
	if tunneled(want.Plan.Probes) {
		for _, name := range h.config.Interfaces {
			device, err := netlink.LinkByName(name)
			if err != nil {
				return fmt.Errorf("interfaces: %s: %w; name devices that exist", name, err)
			}
			pin := probePin + strconv.Itoa(device.Attrs().Index)
			wanted[pin] = true
			if err := h.attachTC(device.Attrs().Index, pin, loaded.FairleadProbe, ebpf.AttachTCXEgress); err != nil {
				return err
			}
		}
	}
	if want.Plan.Backend {
		for _, index := range want.PodInterfaces {
			pin := podPin + strconv.Itoa(index)
			wanted[pin] = true
			if err := h.attachTC(index, pin, loaded.FairleadPod, ebpf.AttachTCXIngress); err != nil {
				return err
			}
		}
	}
	return h.detachOthers(wanted)
}

// Pins of programs that come and go while the agent runs: what follows is the
// device's index.
const (
	podPin   = "pod-"
	probePin = "probe-"
)

func comesAndGoes(pin string) bool {
	return strings.HasPrefix(pin, podPin) || strings.HasPrefix(pin, probePin)
}

// tunneled says whether any probe has to be sent through a tunnel.
func tunneled(probes []lb.Probe) bool {
	return slices.ContainsFunc(probes, func(p lb.Probe) bool { return p.Tunneled })
}

func (h *hooks) attachXDP(device netlink.Link, program *ebpf.Program) error {
	name, pin := device.Attrs().Name, "xdp-"+device.Attrs().Name
	known, err := h.known(pin, uint32(device.Attrs().Index))
	if err != nil {
		return err
	}
	if known != nil {
		if err := known.Update(program); err != nil {
			return fmt.Errorf("replace the XDP program on %s: %w", name, err)
		}
		return nil
	}
	options := link.XDPOptions{Program: program, Interface: device.Attrs().Index, Flags: link.XDPDriverMode}
	made, err := link.AttachXDP(options)
	if errors.Is(err, unix.EOPNOTSUPP) && h.config.Generic {
		h.config.Log.Warn("the driver has no native XDP: using generic XDP, which is several times slower", "interface", name)
		options.Flags = link.XDPGenericMode
		made, err = link.AttachXDP(options)
	}
	if err != nil {
		return foreignXDP(device, err)
	}
	return h.pin(made, pin)
}

// foreignXDP explains why XDP could not be attached.
func foreignXDP(device netlink.Link, err error) error {
	name := device.Attrs().Name
	if found := device.Attrs().Xdp; found != nil && found.Attached {
		return fmt.Errorf("attach XDP to %s: it already carries %s, which is not ours; detach it (ip link set dev %s xdp off), or take %s out of interfaces",
			name, describeProgram(ebpf.ProgramID(found.ProgId)), name, name)
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("attach XDP to %s: %w; its driver has no native XDP for frames of this MTU: lower the MTU, or set genericXDP: true", name, err)
	}
	return fmt.Errorf("attach XDP to %s: %w", name, err)
}

func describeProgram(id ebpf.ProgramID) string {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return fmt.Sprintf("XDP program %d", id)
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return fmt.Sprintf("XDP program %d", id)
	}
	return fmt.Sprintf("XDP program %d (%s)", id, info.Name)
}

// known returns the link of a hook: the one that we hold, or else one that an
// earlier agent left pinned, if it is still on the same device.
func (h *hooks) known(pin string, ifindex uint32) (link.Link, error) {
	if l, ok := h.links[pin]; ok {
		if linkIndex(l) == ifindex {
			return l, h.repin(l, pin)
		}
		l.Close()
		delete(h.links, pin)
	}
	path := filepath.Join(h.config.PinDir, pin)
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && linkIndex(l) == ifindex {
		h.links[pin] = l
		return l, nil
	}
	if err == nil {
		l.Close()
	}
	if err := os.Remove(path); err != nil {
		return nil, fmt.Errorf("remove the stale pin %s: %w", path, err)
	}
	return nil, nil
}

// repin puts back a pin that somebody removed: without it, what is attached
// would end with this process.
func (h *hooks) repin(l link.Link, pin string) error {
	path := filepath.Join(h.config.PinDir, pin)
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := l.Unpin(); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget the pin %s that was removed: %w", path, err)
	}
	if err := errors.Join(os.MkdirAll(h.config.PinDir, 0o700), l.Pin(path)); err != nil {
		return fmt.Errorf("put back the pin %s that was removed: %w", path, err)
	}
	h.config.Log.Warn("a pin was removed by somebody, and is back", "pin", path)
	return nil
}

// linkIndex is the device that a link is on; 0 when it has gone.
func linkIndex(l link.Link) uint32 {
	info, err := l.Info()
	if err != nil {
		return 0
	}
	if xdp := info.XDP(); xdp != nil {
		return xdp.Ifindex
	}
	if tcx := info.TCX(); tcx != nil {
		return tcx.Ifindex
	}
	return 0
}

func (h *hooks) pin(made link.Link, pin string) error {
	path := filepath.Join(h.config.PinDir, pin)
	if err := made.Pin(path); err != nil {
		return errors.Join(fmt.Errorf("pin %s: %w", path, err), made.Close())
	}
	h.links[pin] = made
	return nil
}

// attachTC attaches by a tcx link behind other programs, or, before Linux
// 6.6, by a filter of a fixed handle and priority, replaced in place.
func (h *hooks) attachTC(ifindex int, pin string, program *ebpf.Program, where ebpf.AttachType) error {
	known, err := h.known(pin, uint32(ifindex))
	if err != nil {
		return err
	}
	if known != nil {
		if err := known.Update(program); err != nil {
			return fmt.Errorf("replace the tc program of %s: %w", pin, err)
		}
		return nil
	}
	if !h.clsact[pin] {
		made, err := link.AttachTCX(link.TCXOptions{Interface: ifindex, Program: program, Attach: where, Anchor: link.Tail()})
		if err == nil {
			return h.pin(made, pin)
		}
		if !errors.Is(err, link.ErrNotSupported) {
			return fmt.Errorf("attach the tc program of %s: %w", pin, err)
		}
	}
	if err := setFilter(ifindex, program, placeOf(pin, where)); err != nil {
		return fmt.Errorf("attach the tc program of %s: %w", pin, err)
	}
	h.clsact[pin] = true
	return nil
}

// place is where a filter stands, when there is no tcx.
type place struct{ parent, handle uint32 }

// places are those of fairlead_pod, fairlead_egress and fairlead_probe.
var places = []place{{netlink.HANDLE_MIN_INGRESS, 0xf1}, {netlink.HANDLE_MIN_EGRESS, 0xf1}, {netlink.HANDLE_MIN_EGRESS, 0xf2}}

func placeOf(pin string, where ebpf.AttachType) place {
	switch {
	case where == ebpf.AttachTCXIngress:
		return places[0]
	case strings.HasPrefix(pin, probePin):
		return places[2]
	}
	return places[1]
}

func setFilter(ifindex int, program *ebpf.Program, where place) error {
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}}
	if err := netlink.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add clsact: %w", err)
	}
	return netlink.FilterReplace(filter(ifindex, program, where))
}

func filter(ifindex int, program *ebpf.Program, where place) *netlink.BpfFilter {
	f := &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{LinkIndex: ifindex, Parent: where.parent, Handle: where.handle,
		Priority: uint16(where.handle), Protocol: unix.ETH_P_ALL}, Name: "fairlead", DirectAction: true}
	if program != nil {
		f.Fd = program.FD()
	}
	return f
}

// detachOthers removes fairlead_pod from devices that no Pod of ours is behind,
// and fairlead_probe where nothing is probed, also where an earlier agent left
// them.
func (h *hooks) detachOthers(wanted map[string]bool) error {
	entries, err := os.ReadDir(h.config.PinDir)
	if err != nil {
		return fmt.Errorf("read pinDir: %w", err)
	}
	for _, entry := range entries {
		pin := entry.Name()
		if !comesAndGoes(pin) || wanted[pin] {
			continue
		}
		if l, ok := h.links[pin]; ok {
			l.Close()
			delete(h.links, pin)
		}
		if err := os.Remove(filepath.Join(h.config.PinDir, pin)); err != nil {
			return fmt.Errorf("detach from %s: %w", pin, err)
		}
	}
	for pin := range h.clsact {
		if !comesAndGoes(pin) || wanted[pin] {
			continue
		}
		where := places[0]
		if strings.HasPrefix(pin, probePin) {
			where = places[2]
		}
		index, _ := strconv.Atoi(strings.TrimPrefix(strings.TrimPrefix(pin, podPin), probePin))
		if err := netlink.FilterDel(filter(index, nil, where)); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("detach from %s: %w", pin, err)
		}
		delete(h.clsact, pin)
	}
	return nil
}

// close lets go of the links without detaching: their pins hold them.
func (h *hooks) close() error {
	var errs []error
	for _, l := range h.links {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}
