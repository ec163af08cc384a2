// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/need"
)

// BenchmarkFeature prints the cost of a packet of a service with one feature
// on, in ns, beside a service of the same node without any.
func BenchmarkFeature(b *testing.B) {
	need.Root(b)
	rate := lb.Rate{Connections: 1e8, Packets: 1e9, Bits: 1e12}
	for _, f := range []struct {
		name  string
		mode  bpfMode
		flags bpfServiceFlag
		set   func(*testing.B, *bpfObjects)
	}{
		{"off", bpfModeMODE_GENEVE, 0, nil},
		{"ranges=1", bpfModeMODE_GENEVE, bpfServiceFlagSERVICE_RANGES, func(b *testing.B, o *bpfObjects) { benchRanges(b, o, 1) }},
		{"ranges=10000", bpfModeMODE_GENEVE, bpfServiceFlagSERVICE_RANGES, func(b *testing.B, o *bpfObjects) { benchRanges(b, o, 10000) }},
		{"limits", bpfModeMODE_GENEVE, bpfServiceFlagSERVICE_LIMITS, func(b *testing.B, o *bpfObjects) {
			benchPut(b, o.ServiceLimits, uint32(1), bpfServiceLimit{All: ratesOf(rate)})
		}},
		{"limits-per-client", bpfModeMODE_GENEVE, bpfServiceFlagSERVICE_LIMITS, func(b *testing.B, o *bpfObjects) {
			benchPut(b, o.ServiceLimits, uint32(1), bpfServiceLimit{Client: ratesOf(rate)})
		}},
		{"affinity", bpfModeMODE_GENEVE, bpfServiceFlagSERVICE_AFFINITY, nil},
		{"l2", bpfModeMODE_L2, 0, nil},
		{"nat", bpfModeMODE_NAT, bpfServiceFlagSERVICE_NAT, nil},
	} {
		b.Run(f.name, func(b *testing.B) {
			objects := benchBalancer(b, f.mode)
			var word uint64
			if err := objects.ServiceWords.Lookup(uint32(1), &word); err != nil {
				b.Fatal(err)
			}
			benchPut(b, objects.ServiceWords, uint32(1), word|uint64(f.flags)<<serviceFlagsShift)
			if f.set != nil {
				f.set(b, objects)
			}
			frame := benchFrame("tcp", 4, benchVIP[4])
			if f.mode == bpfModeMODE_NAT {
				frame = benchFrame("syn", 4, benchVIP[4]) // what has no entry begins one, or none
			}
			generator := benchGenerator(b, objects, frame, varyClient(frame, 4), 10_000)
			generator.measure(b, frame, map[string]*ebpf.Program{"generator": generator.Nothing, "packet": objects.FairleadXdp, "prototype": generator.Prototype})
		})
	}
}

func benchPut(b *testing.B, m *ebpf.Map, key, value any) {
	b.Helper()
	if err := m.Put(key, value); err != nil {
		b.Fatal(err)
	}
}

// benchRanges opens the service to everybody, and to n small prefixes.
func benchRanges(b *testing.B, o *bpfObjects, n int) {
	b.Helper()
	benchPut(b, o.SourceRanges, sourceKey(1, netip.MustParsePrefix("0.0.0.0/0")), uint32(1))
	for i := range uint32(n) {
		var a [4]byte
		binary.BigEndian.PutUint32(a[:], i<<16|i<<3)
		benchPut(b, o.SourceRanges, sourceKey(1, netip.PrefixFrom(netip.AddrFrom4(a), 29).Masked()), uint32(1))
	}
}

// TestLimitRate measures what a limit lets through, from one core and from two
// that send much more, in packets of 64 and 1,500 bytes. What may come at once
// is left out: a burst is no rate.
func TestLimitRate(t *testing.T) {
	need.Root(t)
	p := l2Paths[0]
	for _, size := range []int{64, 1500} {
		for _, cores := range []int{1, 2} {
			for name, rate := range map[string]lb.Rate{"packets": {Packets: 50_000}, "bits": {Bits: 100_000_000}} {
				n := limited(t, p, lb.Limits{All: rate})
				in := p.packet("tcp", make([]byte, size-14-40))
				in.ttl = 255
				perPacket := uint64(8 * len(in.bytes()))
				set := float64(rate.Packets) + float64(rate.Bits)/float64(perPacket)
				n.flood(fromRouter(in), cores, 200*time.Millisecond) // the burst
				before, began := n.counter(n.ServiceCounters, 1), time.Now()
				sent := n.flood(fromRouter(in), cores, time.Second)
				took := time.Since(began).Seconds()
				got := float64(n.counter(n.ServiceCounters, 1).Packets-before.Packets) / took
				t.Logf("%d bytes, %d cores, %s: set %.0f/s, offered %.0f/s, measured %.0f/s (%+.2f%%)", size, cores, name, set, float64(sent)/took, got, 100*(got/set-1))
				// Less comes through where the senders have to wait for a processor.
				if got == 0 || got > 1.05*set {
					t.Errorf("%d bytes, %d cores, %s: %.0f/s passed, and %.0f/s may", size, cores, name, got, set)
				}
			}
		}
	}
}

// flood gives a frame to the program from so many cores for a while, and
// returns how often.
func (n *network) flood(frame []byte, cores int, while time.Duration) (sent uint64) {
	n.t.Helper()
	var wait sync.WaitGroup
	counts := make([]uint64, cores)
	deadline := time.Now().Add(while)
	for i := range cores {
		wait.Go(func() {
			runtime.LockOSThread() // and ends with the thread
			var set unix.CPUSet
			set.Set(i % runtime.NumCPU())
			_ = unix.SchedSetaffinity(0, &set)
			for time.Now().Before(deadline) {
				const batch = 1 << 13 // each frame of 64 is sent on so often that its TTL lasts
				options := ebpf.RunOptions{Data: frame, Repeat: batch, Flags: liveFrames, Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: ingress}}
				if _, err := n.FairleadXdp.Run(&options); err != nil {
					n.t.Error(err)
					return
				}
				counts[i] += batch
			}
		})
	}
	wait.Wait()
	for _, c := range counts {
		sent += c
	}
	return sent
}
