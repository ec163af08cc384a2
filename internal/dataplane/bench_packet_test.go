// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/need"
)

// One round of each measured program; the rounds are taken in turn, so that
// what disturbs the machine disturbs all of them.
const benchRound = 50_000

// The network that the packet benchmarks balance in: one service of each kind
// on 100 backends, so its slots (16,384, or 128 KiB) do not all stay in the
// first-level cache.
const (
	benchBackends = 100
	benchBits     = 14
	benchPort     = 80
)

var (
	benchVIP  = map[int]netip.Addr{4: netip.MustParseAddr("192.0.2.1"), 6: netip.MustParseAddr("2001:db8::1")}
	benchNode = netip.MustParseAddr("10.0.0.1")
)

// BenchmarkPacket prints the cost of one packet in the LB role, in ns, less
// what it takes to make it; beside it the generator's own cost and that of the
// stateless prototype in the same run, which balances IPv4 alone.
func BenchmarkPacket(b *testing.B) {
	need.Root(b)
	for _, kind := range []string{"tcp", "syn", "udp"} {
		for _, family := range []int{4, 6} {
			for _, mode := range []bpfMode{bpfModeMODE_IPIP, bpfModeMODE_GENEVE} {
				for _, flows := range []int{1, 1000, 100_000, 1_000_000} {
					name := fmt.Sprintf("%s/v%d/%s/flows=%d", kind, family, modeName(mode), flows)
					b.Run(name, func(b *testing.B) {
						benchmarkPacket(b, benchFrame(kind, family, benchVIP[family]), family, mode, flows, family == 4)
					})
				}
			}
		}
	}
	b.Run("notvip", func(b *testing.B) {
		frame := benchFrame("tcp", 4, netip.MustParseAddr("192.0.2.200"))
		benchmarkPacket(b, frame, 4, bpfModeMODE_IPIP, 1000, false)
	})
}

func modeName(mode bpfMode) string {
	if mode == bpfModeMODE_GENEVE {
		return "geneve"
	}
	return "ipip"
}

func benchmarkPacket(b *testing.B, frame []byte, family int, mode bpfMode, flows int, baseline bool) {
	objects := benchBalancer(b, mode)
	generator := benchGenerator(b, objects, frame, varyClient(frame, family), flows)
	targets := map[string]*ebpf.Program{"generator": generator.Nothing, "packet": objects.FairleadXdp}
	if baseline {
		targets["prototype"] = generator.Prototype
	}
	generator.measure(b, frame, targets)
}

// measure runs the targets in turn, and prints what each costs less the
// generator.
func (g *benchObjectsSet) measure(b *testing.B, frame []byte, targets map[string]*ebpf.Program) {
	b.Helper()
	pinned(b)
	generate, target := g.Generate, g.Target
	if targets["packet"].Type() == ebpf.SchedCLS {
		generate, target = g.GenerateTC, g.TargetTC
	}
	measured := map[string][]float64{}
	for range max(b.N, 10) {
		for name, program := range targets {
			if err := target.Put(uint32(0), uint32(program.FD())); err != nil {
				b.Fatal(err)
			}
			action, took, err := generate.Benchmark(frame, benchRound, nil)
			if err != nil {
				b.Fatal(err)
			}
			if wrong := target == g.Target && (action == xdpDrop || action == 0); wrong || target == g.TargetTC && action == tcShot {
				b.Fatalf("%s: action %d: what is measured is dropped", name, action)
			}
			measured[name] = append(measured[name], float64(took.Nanoseconds()))
		}
	}
	empty := least(measured["generator"])
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(least(measured["packet"])-empty, "ns/packet")
	if len(measured["prototype"]) > 0 {
		b.ReportMetric(least(measured["prototype"])-empty, "prototype-ns/packet")
	}
	b.ReportMetric(empty, "generator-ns/packet")
}

// least of many short rounds: what disturbs a round only ever adds to it.
func least(of []float64) float64 { return slices.Min(of) }

// pinned keeps the benchmark on the machine's last core.
func pinned(b *testing.B) {
	b.Helper()
	runtime.LockOSThread()
	var old, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &old); err != nil {
		b.Fatal(err)
	}
	one.Set(runtime.NumCPU() - 1)
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := unix.SchedSetaffinity(0, &old); err != nil {
			b.Error(err)
		}
		runtime.UnlockOSThread()
	})
}

// benchFrame is 64 bytes of IPv4 or 80 of IPv6, padded, from a client that the
// generator varies.
func benchFrame(kind string, family int, vip netip.Addr) []byte {
	proto, l4 := byte(unix.IPPROTO_TCP), make([]byte, 20)
	l4[12] = 5 << 4
	switch kind {
	case "tcp":
		l4[13] = 0x10 // ACK
	case "syn":
		l4[13] = 0x02
	case "udp":
		proto, l4 = unix.IPPROTO_UDP, make([]byte, 18)
		binary.BigEndian.PutUint16(l4[4:], uint16(len(l4)))
	}
	binary.BigEndian.PutUint16(l4[2:], benchPort)
	frame := make([]byte, 14, 80)
	if family == 4 {
		binary.BigEndian.PutUint16(frame[12:], unix.ETH_P_IP)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(20+len(l4)))
		copy(ip[16:], vip.AsSlice())
		return append(append(frame, ip...), l4...)[:64]
	}
	binary.BigEndian.PutUint16(frame[12:], unix.ETH_P_IPV6)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	copy(ip[8:], netip.MustParseAddr("2001:db8:c::").AsSlice())
	copy(ip[24:], vip.AsSlice())
	return append(append(frame, ip...), l4...)[:80]
}

// vary says where in a frame the generator writes.
type vary struct{ client, port, sum, hash uint32 }

// varyClient is for a plain packet of a client.
func varyClient(frame []byte, family int) vary {
	if family == 6 {
		return vary{client: 14 + 8 + 12, port: 14 + 40}
	}
	return vary{client: 14 + 12, port: 14 + 20, sum: headerSum(frame[14:])}
}

// headerSum is the sum of an IPv4 header whose client and checksum are 0.
func headerSum(header []byte) (sum uint32) {
	for at := 0; at < 20; at += 2 {
		sum += uint32(binary.NativeEndian.Uint16(header[at:]))
	}
	return sum
}

func benchGenerator(b *testing.B, objects *bpfObjects, frame []byte, at vary, flows int) *benchObjectsSet {
	b.Helper()
	spec, err := loadBench()
	if err != nil {
		b.Fatal(err)
	}
	var room [192]uint8
	copy(room[:], frame)
	for name, value := range map[string]any{"frame": room, "frame_length": uint32(len(frame)), "client_offset": at.client, "port_offset": at.port,
		"hash_offset": at.hash, "flow_count": uint32(flows), "partial_sum": at.sum, "config": benchConfig()} {
		if err := spec.Variables[name].Set(value); err != nil {
			b.Fatal(err)
		}
	}
	shared := map[string]*ebpf.Map{"services": objects.Services, "service_words": objects.ServiceWords,
		"slots": objects.Slots, "backends": objects.Backends, "next_hops": objects.NextHops,
		"service_counters": objects.ServiceCounters, "backend_counters": objects.BackendCounters}
	for name, m := range shared {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	var set benchObjectsSet
	if err := spec.LoadAndAssign(&set, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		for _, closer := range []interface{ Close() error }{set.Generate, set.GenerateTC, set.Nothing, set.NothingTC, set.Prototype, set.Sink, set.Pass, set.Target, set.TargetTC, set.Received} {
			closer.Close()
		}
	})
	return &set
}

// benchObjectsSet is what of bench.bpf.c is used; its maps are the others'.
type benchObjectsSet struct {
	Generate   *ebpf.Program `ebpf:"generate"`
	GenerateTC *ebpf.Program `ebpf:"generate_tc"`
	NothingTC  *ebpf.Program `ebpf:"nothing_tc"`
	TargetTC   *ebpf.Map     `ebpf:"target_tc"`
	Nothing    *ebpf.Program `ebpf:"nothing"`
	Prototype  *ebpf.Program `ebpf:"prototype"`
	Sink       *ebpf.Program `ebpf:"sink"`
	Pass       *ebpf.Program `ebpf:"pass"`
	Target     *ebpf.Map     `ebpf:"target"`
	Received   *ebpf.Map     `ebpf:"received"`
}

func benchKey() flowhash.Key { return flowhash.Secret{1, 2, 3}.FlowKey() }

func benchConfig() bpfConfig {
	key := benchKey()
	config := bpfConfig{Lb: 1, Backend: 1, Vni: 1, GenevePort: swap16(6082), BudgetFloor: 1 << 31}
	config.Key = [2]uint64{binary.LittleEndian.Uint64(key[:8]), binary.LittleEndian.Uint64(key[8:])}
	config.Node4 = bpfAddrOf(benchNode)
	config.Ipip4 = config.Node4
	config.Node6 = bpfAddrOf(netip.MustParseAddr("fd00::1"))
	config.Ipip6 = config.Node6
	return config
}
