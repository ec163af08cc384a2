// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
	"fairlead.dev/fairlead/internal/slots"
)

// BenchmarkCensus prints what a census costs: reading a million flows at a
// backend's node, once for all that ask within a second; answering one LB node
// about one of its Pods; and, at the LB node, taking in the answers of 5,000
// backends of one service.
func BenchmarkCensus(b *testing.B) {
	b.Run("read/flows=1000000", func(b *testing.B) {
		d, key := benchFlowsOf(b, 1_000_000)
		started := time.Now()
		for range b.N {
			d.ownership = nil
			if _, err := d.Owned(); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(time.Since(started).Seconds()*1e3/float64(b.N), "ms")
		owned, err := d.Owned()
		must(b, err)
		flows, _ := owned.Slots(key.frontend, key.protocol, key.target, 12)
		if flows != 1_000_000 {
			b.Fatalf("%d flows", flows)
		}
	})
	b.Run("answer/flows=1000000", func(b *testing.B) {
		d, key := benchFlowsOf(b, 1_000_000)
		owned, err := d.Owned()
		must(b, err)
		b.ResetTimer()
		started := time.Now()
		for range b.N {
			owned.Slots(key.frontend, key.protocol, key.target, 12)
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(time.Since(started).Seconds()*1e3/float64(b.N), "ms")
	})
	b.Run("take/backends=5000", func(b *testing.B) {
		f, want := benchMany(b, 5000)
		answers := map[lb.BackendID]slots.Answer{}
		random := rand.New(rand.NewPCG(1, 2))
		for _, backend := range want.Plan.Frontends[0].Backends {
			owns := make([]uint64, 131072/64)
			for range 200 {
				at := random.IntN(131072)
				owns[at/64] |= 1 << (at % 64)
			}
			answers[backend.ID] = slots.Answer{Asked: f.now, Owns: owns}
		}
		started := time.Now()
		for range b.N {
			must(b, f.balancer.census(Answers{want.Plan.Frontends[0].ID: answers}, f.now))
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(time.Since(started).Seconds()*1e3/float64(b.N), "ms")
	})
}

func benchFlowsOf(b *testing.B, flows int) (*Dataplane, owner) {
	b.Helper()
	vethNamespace(b)
	limits := smallLimits
	limits.Flows = flows + 1
	d := openTest(b, pinDir(b), limits)
	must(b, d.Set(context.Background(), desired(testPlan(1))))
	pod, vip := netip.MustParseAddrPort("10.244.0.9:53"), netip.MustParseAddrPort("192.0.2.1:53")
	keys, values := make([]bpfFlowKey, flows), make([]bpfFlow, flows)
	for i := range keys {
		client := benchFlow(i)
		keys[i] = bpfFlowKey{Client: bpfAddrOf(client.Addr()), ClientPort: swap16(client.Port()), Vip: bpfAddrOf(vip.Addr()), VipPort: swap16(vip.Port()), Proto: 17}
		values[i] = bpfFlow{Pod: bpfAddrOf(pod.Addr()), PodPort: swap16(pod.Port()), State: uint8(bpfFlowStateFLOW_ESTABLISHED), Hash: rand.Uint64()}
	}
	_, err := d.loaded.Flows.BatchUpdate(keys, values, nil)
	must(b, err)
	return d, owner{vip, pod, lb.UDP}
}

// benchMany is a service of n backends.
func benchMany(b testing.TB, n int) (*fake, Desired) {
	b.Helper()
	limits := smallLimits
	limits.Slots, limits.Backends, limits.Candidates = 1<<18, n+2, 1<<18
	f := newFakeOf(b, limits)
	want := desired(testPlan(1))
	want.Plan.Frontends = want.Plan.Frontends[1:]
	web := &want.Plan.Frontends[0]
	first := web.Backends[0]
	web.Backends, web.TableSize = nil, maglev.Size(n)
	for i := range n {
		first.ID.Target = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 244, byte(i >> 8), byte(i)}), 8080)
		web.Backends = append(web.Backends, first)
	}
	must(b, f.set(want))
	return f, want
}

// BenchmarkGone prints the time from the verdict that a backend is gone until
// the last packet to it, while another thread sends as fast as it can.
func BenchmarkGone(b *testing.B) {
	vethNamespace(b)
	d := openTest(b, pinDir(b), Limits{Services: 64, Slots: 1 << 18, Backends: 8192, Candidates: 1 << 16})
	_, want := benchMany(b, 1000)
	must(b, d.Set(context.Background(), want))
	web := &want.Plan.Frontends[0]
	gone := web.Backends[500]
	without := want
	without.Plan.Frontends = slices.Clone(want.Plan.Frontends)
	without.Plan.Frontends[0].Backends = slices.Delete(slices.Clone(web.Backends), 500, 501)
	number := d.balancer.backends[gone.ID].number
	var last atomic.Int64
	stop, stopped := make(chan struct{}), make(chan struct{})
	program, counters := d.loaded.FairleadXdp, d.loaded.BackendCounters
	frames := benchFramesTo(b, d, want, number)
	go func() {
		defer close(stopped)
		before := sent(b, counters, number)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := program.Run(&ebpf.RunOptions{Data: frames[i%len(frames)], DataOut: make([]byte, 256)}); err != nil {
				b.Error(err)
				return
			}
			if now := sent(b, counters, number); now != before {
				before = now
				last.Store(time.Now().UnixNano())
			}
		}
	}()
	var took []float64
	for range max(b.N, 5) {
		must(b, d.Set(context.Background(), want))
		number = d.balancer.backends[gone.ID].number
		time.Sleep(20 * time.Millisecond)
		verdict := time.Now()
		must(b, d.Set(context.Background(), without))
		time.Sleep(20 * time.Millisecond)
		took = append(took, float64(last.Load()-verdict.UnixNano())/1e6)
	}
	close(stop)
	<-stopped
	b.ReportMetric(0, "ns/op")
	slices.Sort(took)
	b.ReportMetric(took[len(took)/2], "ms")
	b.ReportMetric(took[len(took)-1], "worst-ms")
}

func sent(b *testing.B, m *ebpf.Map, number uint32) (packets uint64) {
	var values []bpfCounter
	if err := m.Lookup(number, &values); err != nil {
		b.Error(err)
	}
	for _, v := range values {
		packets += v.Packets
	}
	return packets
}

// benchFramesTo are SYNs whose slots have the backend of a number.
func benchFramesTo(b *testing.B, d *Dataplane, want Desired, number uint32) (frames [][]byte) {
	b.Helper()
	id := want.Plan.Frontends[0].ID
	f := d.balancer.frontends[id]
	key := d.config.Secret.FlowKey()
	for i := 0; len(frames) < 8; i++ {
		client := benchFlow(i)
		hash := key.Hash(client.Addr(), id.VIP, client.Port(), id.Port, 6)
		if f.table.Owner(uint32(hash>>(64-f.bits))) != number {
			continue
		}
		p := ipPacket{src: client.Addr(), dst: id.VIP, proto: protoTCP, ttl: 60, payload: tcpSegment(client, netip.AddrPortFrom(id.VIP, id.Port), tcpSYN, nil)}
		frames = append(frames, fromRouter(p))
	}
	return frames
}
