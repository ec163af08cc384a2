// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

// liveFrames is BPF_F_TEST_XDP_LIVE_FRAMES: what the test run makes is sent.
const liveFrames = 1 << 1

// One round of live frames: the generator sends so many, and waits for them.
const liveRound = 500_000

// forwarder is a generator and sink on one end of a veth pair, and a node that
// balances on the other.
type forwarder struct {
	*testnet.Pair
	generator *benchObjectsSet
	frame     []byte
}

// BenchmarkForward prints packets a second end to end: 64-byte TCP packets of
// established connections from a generator through one node to a sink, by
// Fairlead's XDP program, and on the same veths by the kernel, as kube-proxy's
// nftables mode does it.
func BenchmarkForward(b *testing.B) {
	need.Root(b)
	need.Tool(b, "nft")
	for _, flows := range []int{1000, 100_000} {
		b.Run(fmt.Sprintf("xdp/flows=%d", flows), func(b *testing.B) {
			f, objects := newForwarder(b, flows)
			f.attach(b, f.Inside, objects.FairleadXdp)
			f.measure(b)
		})
		b.Run(fmt.Sprintf("nftables/flows=%d", flows), func(b *testing.B) {
			f, _ := newForwarder(b, flows)
			f.attach(b, f.Inside, f.generator.Pass)
			f.balanceByKernel(b)
			f.measure(b)
		})
	}
}

func newForwarder(b *testing.B, flows int) (*forwarder, *bpfObjects) {
	b.Helper()
	outside, inside := netip.MustParsePrefix("10.0.0.254/24"), netip.PrefixFrom(benchNode, 24)
	pair, err := testnet.NewPair([]netip.Prefix{outside}, []netip.Prefix{inside})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(pair.Close)
	theirs, err := pair.Outside.MAC()
	if err != nil {
		b.Fatal(err)
	}
	ours, err := pair.Inside.MAC()
	if err != nil {
		b.Fatal(err)
	}
	index, err := pair.Inside.Device(testnet.Uplink)
	if err != nil {
		b.Fatal(err)
	}
	if err := pair.Inside.SetNeighbour(outside.Addr(), theirs); err != nil {
		b.Fatal(err)
	}
	objects := benchBalancer(b, bpfModeMODE_IPIP)
	if err := objects.NextHops.Put(uint32(1), bpfNextHop{Ifindex: uint32(index), DstMac: [6]uint8(theirs), SrcMac: [6]uint8(ours), Mtu: 1500}); err != nil {
		b.Fatal(err)
	}
	frame := benchFrame("tcp", 4, benchVIP[4])
	copy(frame, ours)
	copy(frame[6:], theirs)
	f := &forwarder{pair, benchGenerator(b, objects, frame, varyClient(frame, 4), flows), frame}
	if err := f.generator.Target.Put(uint32(0), uint32(f.generator.Nothing.FD())); err != nil {
		b.Fatal(err)
	}
	f.attach(b, pair.Outside, f.generator.Sink)
	return f, objects
}

func (f *forwarder) attach(b *testing.B, n *testnet.Namespace, program *ebpf.Program) {
	b.Helper()
	index, err := n.Device(testnet.Uplink)
	if err != nil {
		b.Fatal(err)
	}
	if err := n.Do(func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: index, Flags: link.XDPDriverMode})
		if err == nil {
			b.Cleanup(func() { l.Close() })
		}
		return err
	}); err != nil {
		b.Fatal(err)
	}
}

// balanceByKernel translates by hash to the same backends, with connection
// tracking on.
func (f *forwarder) balanceByKernel(b *testing.B) {
	b.Helper()
	var backends []string
	for n := range uint32(benchBackends) {
		backends = append(backends, fmt.Sprintf("%d: %s", n, netip.AddrFrom4([4]byte{10, 0, 1, byte(n)})))
	}
	rules := fmt.Sprintf("table ip t {\nchain pre {\ntype nat hook prerouting priority dstnat;\nip daddr %s tcp dport %d dnat to jhash ip saddr . tcp sport mod %d map { %s }\n}\n}\n",
		benchVIP[4], benchPort, benchBackends, strings.Join(backends, ", "))
	if _, err := f.Inside.Run("sh", "-c", "printf '"+rules+"' | nft -f -"); err != nil {
		b.Fatal(err)
	}
	// The generator's packets carry no TCP checksum.
	if err := f.Inside.Sysctl(map[string]string{"netfilter/nf_conntrack_checksum": "0"}); err != nil {
		b.Fatal(err)
	}
	if err := f.Inside.SetRoute(testnet.Route{To: netip.MustParsePrefix("10.0.1.0/24"), Via: []netip.Addr{netip.MustParseAddr("10.0.0.254")}}); err != nil {
		b.Fatal(err)
	}
	if err := f.Inside.SetRoute(testnet.Route{To: netip.MustParsePrefix("0.0.0.0/0"), Via: []netip.Addr{netip.MustParseAddr("10.0.0.254")}}); err != nil {
		b.Fatal(err)
	}
}

// measure sends rounds of live frames, and counts what arrives. The first, in
// which connection tracking makes its entries, does not count.
func (f *forwarder) measure(b *testing.B) {
	index, err := f.Outside.Device(testnet.Uplink)
	if err != nil {
		b.Fatal(err)
	}
	best, sent, lost := 0.0, uint64(0), uint64(0)
	for round := range max(b.N, 3) + 1 {
		before := perCPU(b, f.generator.Received, 0)
		started := time.Now()
		if err := f.Outside.Do(func() error {
			_, err := f.generator.Generate.Run(&ebpf.RunOptions{Data: f.frame, Flags: liveFrames, Repeat: liveRound,
				Context: &xdpContext{DataEnd: uint32(len(f.frame)), IngressIfindex: uint32(index)}})
			return err
		}); err != nil {
			b.Fatal(err)
		}
		received := f.settle(b) - before
		if round == 0 {
			continue
		}
		best = max(best, float64(received)/time.Since(started).Seconds())
		sent, lost = sent+liveRound, lost+liveRound-min(received, liveRound)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(best/1e6, "Mpps")
	b.ReportMetric(1e9/best, "ns/packet")
	b.ReportMetric(100*float64(lost)/float64(sent), "lost-%")
}

// settle waits until nothing more arrives.
func (f *forwarder) settle(b *testing.B) uint64 {
	b.Helper()
	received := perCPU(b, f.generator.Received, 0)
	for {
		time.Sleep(100 * time.Microsecond)
		now := perCPU(b, f.generator.Received, 0)
		if now == received {
			return now
		}
		received = now
	}
}
