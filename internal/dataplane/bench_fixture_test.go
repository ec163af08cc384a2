// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// benchBalancer loads the program with both roles on, and one service of each
// family and protocol whose slots go round benchBackends backends.
func benchBalancer(b *testing.B, mode bpfMode) *bpfObjects {
	b.Helper()
	objects := benchLoad(b, map[string]int{"slots": 2 << benchBits, "hints": 1 << 18, "source_ranges": 20_000, "nat_flows": 1 << 18, "client_buckets": 1 << 16})
	put := func(m *ebpf.Map, key, value any) {
		if err := m.Put(key, value); err != nil {
			b.Fatal(err)
		}
	}
	put(objects.NextHops, uint32(1), bpfNextHop{Ifindex: 1, DstMac: [6]uint8{2, 0, 0, 0, 0, 1}, SrcMac: [6]uint8{2, 0, 0, 0, 0, 2}, Mtu: 1500})
	for i, family := range []int{4, 6} {
		first, offset := uint32(1+i*benchBackends), uint32(i)<<benchBits
		for n := range uint32(benchBackends) {
			put(objects.Backends, first+n, benchBackend(family, mode, n))
		}
		for slot := range uint32(1) << benchBits {
			put(objects.Slots, offset+slot, uint64(first+slot%benchBackends))
		}
		vip := benchVIP[family]
		word, mask := vipBit(vip)
		put(objects.VipBits, word, mask)
		put(objects.Services, bpfServiceKey{Vip: bpfAddrOf(vip)}, uint32(0))
		for j, proto := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			number := uint32(1 + 2*i + j)
			put(objects.ServiceWords, number, uint64(offset)|benchBits<<32)
			put(objects.Services, bpfServiceKey{Vip: bpfAddrOf(vip), Port: swap16(benchPort), Proto: proto}, number)
		}
	}
	return objects
}

func benchBackend(family int, mode bpfMode, n uint32) bpfBackend {
	pod, tunnel := netip.AddrFrom4([4]byte{10, 244, 0, byte(n)}), netip.AddrFrom4([4]byte{10, 0, 1, byte(n)})
	if family == 6 {
		pod = netip.AddrFrom16([16]byte{0xfd, 1, 15: byte(n)})
		if mode == bpfModeMODE_IPIP {
			tunnel = netip.AddrFrom16([16]byte{0xfd, 0, 15: byte(n)})
		}
	}
	names := map[bpfMode]lb.Mode{bpfModeMODE_GENEVE: lb.ModeGeneve, bpfModeMODE_IPIP: lb.ModeIPIP, bpfModeMODE_L2: lb.ModeL2, bpfModeMODE_NAT: lb.ModeNAT}
	row := backendRow(lb.Backend{ID: lb.BackendID{Target: netip.AddrPortFrom(pod, 8080), Tunnel: tunnel, Mode: names[mode]}}, [8]byte{7})
	row.Word = backendWord(bpfBackendStateBACKEND_ACTIVE, 1, 1)
	return row
}

// withBenchNAT gives mode NAT local addresses enough for many flows.
func withBenchNAT(c *bpfConfig) {
	c.NatFirst, c.NatPorts = 20_000, 40_000
	for i := range c.Nat4 {
		c.Nat4[i] = bpfAddrOf(netip.AddrFrom4([4]byte{10, 0, 9, byte(i)}))
	}
	c.Nat4Count = uint8(len(c.Nat4))
}

// benchLoad loads the program with both roles on and maps of these sizes.
func benchLoad(b *testing.B, sizes map[string]int) *bpfObjects {
	b.Helper()
	spec, err := loadBpf()
	if err != nil {
		b.Fatal(err)
	}
	config := benchConfig()
	config.Tag = [8]byte{benchTag}
	config.IdleTcpNs, config.IdleUdpNs, config.IdleClosingNs = 3600e9, 3600e9, 3600e9
	withBenchNAT(&config)
	if err := spec.Variables["config"].Set(config); err != nil {
		b.Fatal(err)
	}
	for name, size := range sizes {
		spec.Maps[name].MaxEntries = uint32(size)
	}
	var objects bpfObjects
	if err := spec.LoadAndAssign(&objects, nil); err != nil {
		var verifier *ebpf.VerifierError
		if errors.As(err, &verifier) {
			b.Fatalf("load: %+v", verifier)
		}
		b.Fatal(err)
	}
	b.Cleanup(func() { objects.Close() })
	return &objects
}
