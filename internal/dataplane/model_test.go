// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"encoding/hex"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/model"
)

// twin is one node's programs beside the model of the same node. Each frame
// goes to the program that traces, to the one that counts, and to the model.
type twin struct {
	*network
	tracing  bpfPrograms
	model    *model.Node
	tick     time.Duration
	late     bool // see quietMoment
	verdicts map[string]int
	recent   []model.Flow // of what was delivered lately
}

func newTwin(t testing.TB, n *network) *twin {
	t.Helper()
	spec, err := loadBpf()
	if err != nil {
		t.Fatal(err)
	}
	config := n.config
	config.Tracing = 1
	if err := spec.Variables["config"].Set(config); err != nil {
		t.Fatal(err)
	}
	shared := map[string]*ebpf.Map{"services": n.Services, "vip_bits": n.VipBits, "service_words": n.ServiceWords, "slots": n.Slots,
		"backends": n.Backends, "next_hops": n.NextHops, "pods": n.Pods, "flows": n.Flows, "pending": n.Pending,
		"lb_nodes": n.LbNodes, "fragments": n.Fragments, "traces": n.Traces, "candidates": n.Candidates, "hints": n.Hints, "syns": n.Syns,
		"denials": n.Denials, "affinities": n.Affinities, "source_ranges": n.SourceRanges, "budgets": n.Budgets, "service_counters": n.ServiceCounters}
	w := &twin{network: n, verdicts: map[string]int{}}
	var tick unix.Timespec
	if err := unix.ClockGetres(unix.CLOCK_MONOTONIC_COARSE, &tick); err != nil {
		t.Fatal(err)
	}
	w.tick = time.Duration(tick.Nano())
	if err := spec.LoadAndAssign(&w.tracing, &ebpf.CollectionOptions{MapReplacements: shared}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.tracing.Close() })
	w.model = n.model(t)
	return w
}

// model tells the model what the maps tell the program.
func (n *network) model(t testing.TB) *model.Node {
	t.Helper()
	m := &model.Node{LB: n.config.Lb != 0, Backend: n.config.Backend != 0, Key: testKey, Node4: addrOf(n.config.Node4), Node6: addrOf(n.config.Node6),
		VNI: n.config.Vni, GenevePort: swap16(n.config.GenevePort), Tag: n.config.Tag,
		VIPs: map[netip.Addr]bool{}, Services: map[model.Front]model.Service{}, Backends: map[uint32]model.Backend{},
		Pods: map[model.Target][]netip.AddrPort{}, Affinity: map[model.Target]map[netip.AddrPort]time.Duration{}}
	each(t, n.bpfObjects.Services, func(key bpfServiceKey, number uint32) {
		vip := addrOf(key.Vip)
		m.VIPs[vip] = true
		if number != 0 {
			m.Services[model.Front{Address: netip.AddrPortFrom(vip, swap16(key.Port)), Proto: key.Proto}] = n.modelService(t, number)
		}
	})
	for number := uint32(1); number < n.bpfObjects.Backends.MaxEntries(); number++ {
		var row bpfBackend
		if err := n.bpfObjects.Backends.Lookup(number, &row); err != nil {
			t.Fatal(err)
		}
		if row.Mode != 0 {
			m.Backends[number] = n.modelBackend(t, row)
		}
	}
	each(t, n.LbNodes, func(key bpfLbNodeKey, _ uint32) {
		m.LBNodes = append(m.LBNodes, prefixOf(key))
	})
	each(t, n.Pods, func(key bpfPodKey, pod bpfPod) {
		target := model.Target{Address: netip.AddrPortFrom(addrOf(key.Address), swap16(key.Port)), Proto: key.Proto}
		for _, s := range pod.Serves[:pod.Count] {
			front := netip.AddrPortFrom(addrOf(s.Vip), swap16(s.Port))
			m.Pods[target] = append(m.Pods[target], front)
			if s.Affinity != 0 {
				if m.Affinity[target] == nil {
					m.Affinity[target] = map[netip.AddrPort]time.Duration{}
				}
				m.Affinity[target][front] = lasts(s.Affinity)
			}
		}
	})
	return m
}

func prefixOf(key bpfLbNodeKey) netip.Prefix {
	a, length := addrOf(key.Address), int(key.PrefixLen)
	if a.Is4() {
		length -= 96
	}
	return netip.PrefixFrom(a, length)
}

func each[K, V any](t testing.TB, m *ebpf.Map, f func(K, V)) {
	t.Helper()
	var key K
	var value V
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		f(key, value)
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
}

func (n *network) modelService(t testing.TB, number uint32) model.Service {
	t.Helper()
	var word uint64
	if err := n.ServiceWords.Lookup(number, &word); err != nil {
		t.Fatal(err)
	}
	s := model.Service{Number: number, Candidates: map[uint32][]uint32{}, Independent: word>>40&uint64(bpfServiceFlagSERVICE_INDEPENDENT) != 0,
		Orders:   word>>40&uint64(bpfServiceFlagSERVICE_ORDERS) != 0,
		Affinity: word>>40&uint64(bpfServiceFlagSERVICE_AFFINITY) != 0}
	if word>>40&uint64(bpfServiceFlagSERVICE_RANGES) != 0 {
		s.Ranges = []netip.Prefix{}
		each(t, n.SourceRanges, func(key bpfSourceKey, _ uint32) {
			if bits.ReverseBytes32(key.Service) == number {
				s.Ranges = append(s.Ranges, prefixOf(bpfLbNodeKey{PrefixLen: key.PrefixLen - 32, Address: key.Address}))
			}
		})
	}
	if log2 := word >> 32 & 0xff; log2 != 0 {
		for i := range uint32(1) << log2 {
			var slot uint64
			if err := n.bpfObjects.Slots.Lookup(uint32(word)+i, &slot); err != nil {
				t.Fatal(err)
			}
			s.Slots = append(s.Slots, uint32(slot))
			if row := uint32(slot >> 32); row != 0 {
				var candidates bpfCandidateRow
				if err := n.Candidates.Lookup(row, &candidates); err != nil {
					t.Fatal(err)
				}
				s.Candidates[i] = slices.DeleteFunc(candidates.Number[:], func(b uint32) bool { return b == 0 })
			}
		}
	}
	return s
}

func (n *network) modelBackend(t testing.TB, row bpfBackend) model.Backend {
	t.Helper()
	b := model.Backend{Target: netip.AddrPortFrom(addrOf(row.Address), swap16(row.Port)),
		Usable: row.Word>>56 == uint64(bpfBackendStateBACKEND_ACTIVE) || row.Word>>56 == uint64(bpfBackendStateBACKEND_DRAINING),
		Tunnel: addrOf(row.Tunnel), Generation: uint32(row.Word>>32) & 0xffffff}
	b.Active = row.Word>>56 == uint64(bpfBackendStateBACKEND_ACTIVE)
	b.Owns = b.Usable || row.Word>>56 == uint64(bpfBackendStateBACKEND_FAILING)
	binary.NativeEndian.PutUint64(b.Tag[:], row.Tag)
	switch bpfMode(row.Mode) {
	case bpfModeMODE_LOCAL:
		b.Mode = model.Local
		return b
	case bpfModeMODE_L2:
		b.Mode, b.Outer = model.L2, -20
		if addrOf(row.Tunnel).Is6() {
			b.Outer = -40
		}
	case bpfModeMODE_GENEVE:
		b.Mode, b.Outer = model.Geneve, 8+8+4+32+4
		if b.Target.Addr().Is6() {
			b.Outer += 12
		}
	default:
		b.Mode = model.IPIP
	}
	if b.Outer += 20; addrOf(row.Tunnel).Is6() {
		b.Outer += 20
	}
	var hop bpfNextHop
	if err := n.NextHops.Lookup(uint32(row.Word), &hop); err != nil {
		t.Fatal(err)
	}
	b.MTU = int(hop.Mtu)
	return b
}

// trace asks the program that traces.
func (w *twin) trace(t testing.TB, frame []byte) Trace {
	t.Helper()
	if err := w.Traces.Put(uint32(0), bpfTrace{}); err != nil {
		t.Fatal(err)
	}
	options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	action, err := w.tracing.FairleadXdp.Run(&options)
	if err != nil {
		t.Fatal(err)
	}
	var raw bpfTrace
	if err := w.Traces.Lookup(uint32(0), &raw); err != nil {
		t.Fatal(err)
	}
	return decodeTrace(raw, action, options.DataOut)
}

// coarseClock is the clock that the programs read.
func coarseClock(t testing.TB) time.Duration { return clock(t, unix.CLOCK_MONOTONIC_COARSE) }

func clock(t testing.TB, id int32) time.Duration {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(id, &now); err != nil {
		t.Fatal(err)
	}
	return time.Duration(now.Nano())
}

// quietMoment returns the clock that the programs read, when it is not about to
// tick: then they and the model see the same time.
func (w *twin) quietMoment(t testing.TB) time.Duration {
	t.Helper()
	for deadline := time.Now().Add(50 * time.Millisecond); ; {
		now := coarseClock(t)
		if w.late || clock(t, unix.CLOCK_MONOTONIC)-now < w.tick-300*time.Microsecond {
			return now
		}
		w.late = time.Now().After(deadline) // a machine that ticks late is never quiet
	}
}

// receive gives a frame to the programs and to the model, and fails when they
// differ. It returns what they decide, and the frame as it is then.
func (w *twin) receive(t testing.TB, frame []byte) (model.Decision, []byte) {
	t.Helper()
	now := w.quietMoment(t)
	trace := w.trace(t, frame)
	options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256)}
	action, err := w.FairleadXdp.Run(&options)
	if err != nil {
		t.Fatal(err)
	}
	want := w.model.Receive(frame, now)
	got := model.Decision{Verdict: model.Verdict(trace.Verdict), Reason: model.Reason(trace.Drop), Hash: trace.Hash,
		Service: trace.Service, Slot: trace.Slot, Backend: trace.Backend, Pod: trace.Pod, Attempt: trace.Attempt}
	switch trace.Verb {
	case "order":
		got.Verb = uint8(bpfVerbVERB_DELIVER)
	case "question":
		got.Verb = uint8(bpfVerbVERB_ASK)
	}
	if !got.Pod.Addr().IsValid() || got.Pod.Addr().IsUnspecified() {
		got.Pod = netip.AddrPort{}
	}
	if want.Service == 0 {
		want.Hash = 0 // of a tunnel packet: it came with it, and is not traced
	}
	if got != want || trace.Action != action {
		t.Fatalf("the program decides (action %d, %d traced)\n\t%+v\nthe model\n\t%+v\nabout\n%s", action, trace.Action, got, want, hex.Dump(frame))
	}
	w.verdicts[trace.Verdict+" "+trace.Drop]++
	if want.Verdict == model.Deliver {
		flow := model.Flow{Client: trace.Source, VIP: trace.Destination, Proto: trace.Protocol}
		w.recent = append(w.recent[max(0, len(w.recent)-200):], flow)
	}
	return want, options.DataOut
}

// answer lets a Pod of a random flow send something, and its client answer.
func (w *twin) answer(t testing.TB, random *rand.Rand) {
	t.Helper()
	if len(w.recent) == 0 {
		return
	}
	key := w.recent[random.IntN(len(w.recent))]
	entry := w.model.Flows.Confirmed[key]
	if pending := w.model.Flows.Pending[key]; pending != nil {
		entry = pending
	}
	if entry == nil {
		return
	}
	pod, state := entry.Pod, entry.State
	segment := model.Segment{Seq: 5, Ack: 2, Window: 1000, Flags: []uint8{tcpSYN | tcpACK, tcpACK, tcpACK | tcpFIN, tcpRST}[random.IntN(4)]}
	if state == model.HalfOpen && random.IntN(4) > 0 {
		segment.Flags = tcpSYN | tcpACK
	}
	segment.End = segment.Seq + uint32(bits.OnesCount8(segment.Flags&(tcpSYN|tcpFIN)))
	frame := segmentFrame(pod, key.Client, key.Proto, segment)
	if _, _, err := w.FairleadEgress.Test(frame); err != nil {
		t.Fatal(err)
	}
	if !w.model.Answer(key, pod, segment, w.quietMoment(t)) {
		t.Fatalf("the model does not know the flow %v of %s", key, pod)
	}
	w.client(t, random, key, segment)
}

// client answers the Pod: often as it should, to get a connection further.
func (w *twin) client(t testing.TB, random *rand.Rand, key model.Flow, pod model.Segment) {
	t.Helper()
	reply := model.Segment{Seq: pod.Ack, End: pod.Ack, Ack: pod.End, Flags: tcpACK, Window: 100}
	switch random.IntN(6) {
	case 0:
		reply.Flags |= tcpFIN
	case 1:
		reply.Flags = tcpRST
	case 2:
		reply.Seq += 10_000
	case 3:
		reply.Ack++
	}
	if key.Client.Addr().Is4() == key.VIP.Addr().Is4() {
		w.receive(t, segmentFrame(key.Client, key.VIP, key.Proto, reply))
	}
}

func segmentFrame(src, dst netip.AddrPort, proto uint8, s model.Segment) []byte {
	p := ipPacket{src: src.Addr(), dst: dst.Addr(), proto: proto, ttl: 60, payload: udpDatagram(src, dst, nil)}
	if proto == protoTCP {
		b := tcpSegment(src, dst, s.Flags, nil)
		binary.BigEndian.PutUint32(b[4:], s.Seq)
		binary.BigEndian.PutUint32(b[8:], s.Ack)
		binary.BigEndian.PutUint16(b[14:], s.Window)
		b[16], b[17] = 0, 0
		binary.BigEndian.PutUint16(b[16:], transportSum(src.Addr(), dst.Addr(), proto, b))
		p.payload = b
	}
	return fromRouter(p)
}

// compareFlows fails when the tables of flows differ from the model's.
func (w *twin) compareFlows(t testing.TB) {
	t.Helper()
	for name, table := range map[string]struct {
		real *ebpf.Map
		want map[model.Flow]*model.Entry
	}{"flows": {w.Flows, w.model.Flows.Confirmed}, "pending": {w.Pending, w.model.Flows.Pending}} {
		got := map[model.Flow]model.Entry{}
		each(t, table.real, func(key bpfFlowKey, value bpfFlow) {
			got[flowOf(key)] = entryOf(value)
		})
		if len(got) != len(table.want) {
			t.Errorf("%s has %d flows, the model %d", name, len(got), len(table.want))
		}
		for key, want := range table.want {
			plain := *want
			plain.Seen = 0
			if got[key] != plain {
				t.Errorf("%s: %v is\n\t%+v\nthe model's\n\t%+v", name, key, got[key], plain)
			}
		}
	}
}

// compareClients compares who keeps which clients.
func (w *twin) compareClients(t testing.TB) {
	t.Helper()
	got := map[model.Flow]model.Client{}
	each(t, w.Affinities, func(key bpfFlowKey, v bpfAffinity) {
		got[flowOf(key)] = model.Client{Pod: netip.AddrPortFrom(addrOf(v.Pod), swap16(v.PodPort)), Lasts: lasts(v.Affinity), Hash: v.Hash}
	})
	if len(got) != len(w.model.Flows.Clients) {
		t.Errorf("%d clients are kept, by the model %d", len(got), len(w.model.Flows.Clients))
	}
	for key, want := range w.model.Flows.Clients {
		plain := *want
		plain.Seen = 0
		if got[key] != plain {
			t.Errorf("client %v is of\n\t%+v\nthe model's of\n\t%+v", key, got[key], plain)
		}
	}
}

func flowOf(key bpfFlowKey) model.Flow {
	return model.Flow{Client: netip.AddrPortFrom(addrOf(key.Client), swap16(key.ClientPort)),
		VIP: netip.AddrPortFrom(addrOf(key.Vip), swap16(key.VipPort)), Proto: key.Proto}
}

func entryOf(v bpfFlow) model.Entry {
	has := func(fin bpfFlowFin) bool { return bpfFlowFin(v.Fins)&fin != 0 }
	return model.Entry{Pod: netip.AddrPortFrom(addrOf(v.Pod), swap16(v.PodPort)), State: model.State(v.State), Hash: v.Hash,
		Closed: has(bpfFlowFinFLOW_CLOSED), SYNACK: has(bpfFlowFinFLOW_SYN_ACK), FINClient: has(bpfFlowFinFLOW_FIN_CLIENT),
		FINPod: has(bpfFlowFinFLOW_FIN_POD), FINPodAcked: has(bpfFlowFinFLOW_FIN_POD_ACKED),
		PodISN: v.PodIsn, PodAck: v.PodAck, PodSeq: v.PodSeq, PodWindow: v.PodWindow, PodScale: v.PodScale,
		ClientFIN: v.ClientFin, PodFIN: v.PodFin, Affine: v.Affinity != 0}
}

// expectAll fails when a kind of verdict was hardly ever reached: then little
// was compared.
func (w *twin) expectAll(t testing.TB) {
	t.Helper()
	for _, verdict := range []string{"pass ", "forward ", "deliver ", "reply ", "drop malformed", "drop protocol", "drop no_service",
		"drop extension_headers", "drop icmp_unrelated", "drop fragment_unknown", "drop tunnel_source", "drop tunnel_format", "drop tunnel_vni",
		"drop tunnel_tag", "drop tunnel_pod", "drop tunnel_vip", "deny ", "drop unowned", "drop tunnel_bounce"} {
		if w.verdicts[verdict] < 10 {
			t.Errorf("%q was reached %d times: %v", verdict, w.verdicts[verdict], w.verdicts)
		}
	}
}
