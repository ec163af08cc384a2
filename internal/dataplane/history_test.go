// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
	"fairlead.dev/fairlead/internal/model"
	"fairlead.dev/fairlead/internal/slots"
)

// shard is two LB nodes and two workers, all of them real programs on maps of
// their own beside their models. Frames go from one program to the next.
type shard struct {
	t       *testing.T
	random  *rand.Rand
	now     time.Time
	lbs     []*lbTwin
	workers map[netip.Addr]*twin
	pods    []*historyPod
	serial  int
	flows   []*historyFlow
	seen    map[string]int
}

// lbTwin is an LB node whose maps a real balancer writes.
type lbTwin struct {
	*twin
	balancer *balancer
	hops     map[netip.Addr]lb.NextHop
}

type historyPod struct {
	target netip.AddrPort
	worker netip.Addr
	uid    string
	state  lb.BackendState
}

type historyFlow struct {
	key   model.Flow
	begun bool
	seq   uint32
}

var historyVIP = netip.AddrPortFrom(vip4, 80)

func historyTag(node string) (tag [8]byte) {
	copy(tag[:], node)
	return tag
}

func newShard(t *testing.T, seed uint64) *shard {
	s := &shard{t: t, random: rand.New(rand.NewPCG(seed, 3)), now: time.Unix(1000, 0), workers: map[netip.Addr]*twin{}, seen: map[string]int{}}
	addresses := []netip.Addr{worker4, worker4.Next()}
	for i := range 2 {
		own := node4
		for range i {
			own = own.Next()
		}
		n := newNetwork(t, func(c *bpfConfig) { c.Node4, c.Ipip4 = wireAddr(own), wireAddr(own) })
		maps, err := (&objects{bpfObjects: n.bpfObjects}).contents()
		must(t, err)
		t.Cleanup(func() { must(t, maps.unmap()) })
		l := &lbTwin{twin: newTwin(t, n), hops: map[netip.Addr]lb.NextHop{}}
		limits := Limits{}.withDefaults()
		limits.Services, limits.Slots, limits.Backends, limits.Candidates, limits.NextHops = 1024, 65536, 1024, 1024, 1024
		l.balancer = newBalancer(maps, limits, historyTag)
		l.balancer.suspicious = true
		for _, a := range addresses {
			l.hops[a] = lb.NextHop{Interface: ingress, MTU: 1500}
		}
		s.lbs = append(s.lbs, l)
	}
	for i, own := range addresses {
		n := newNetwork(t, func(c *bpfConfig) {
			c.Lb, c.Backend, c.Node4, c.Tag = 0, 1, wireAddr(own), historyTag(fmt.Sprintf("w%d", i))
			c.IdleTcpNs, c.IdleUdpNs, c.IdleClosingNs = 3600e9, 3600e9, 3600e9
		})
		n.put(n.LbNodes, lbNodeKey(netip.PrefixFrom(node4, 24)), uint32(0))
		s.workers[own] = newTwin(t, n)
	}
	for range 6 {
		s.addPod()
	}
	for i := range 80 {
		proto := uint8(protoTCP)
		if i%3 == 0 {
			proto = protoUDP
		}
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}), uint16(2000+i))
		s.flows = append(s.flows, &historyFlow{key: model.Flow{Client: client, VIP: historyVIP, Proto: proto}})
	}
	for _, l := range s.lbs {
		s.apply(l)
	}
	return s
}

func (s *shard) addPod() {
	s.serial++
	i := s.random.IntN(2)
	p := &historyPod{uid: fmt.Sprint(s.serial), worker: []netip.Addr{worker4, worker4.Next()}[i], state: lb.Active}
	taken := func(a netip.AddrPort) bool {
		return slices.ContainsFunc(s.pods, func(o *historyPod) bool { return o.target == a })
	}
	for p.target = s.address(i); taken(p.target); p.target = s.address(i) {
	}
	s.pods = append(s.pods, p)
	s.tellWorker(p.worker, nil)
}

// address is one of few: they come back as other Pods'.
func (s *shard) address(worker int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(worker), byte(1 + s.random.IntN(12))}), podPort)
}

// tellWorker writes a worker's Pods, and purges the flows of one that is gone.
func (s *shard) tellWorker(at netip.Addr, gone *historyPod) {
	w := s.workers[at]
	for _, proto := range []uint8{protoTCP, protoUDP} {
		if gone != nil {
			key := bpfPodKey{Address: wireAddr(gone.target.Addr()), Port: wirePort(podPort), Proto: proto}
			must(s.t, w.Pods.Delete(key))
			must(s.t, (&objects{bpfObjects: w.bpfObjects}).purgeFlows(func(k bpfPodKey) bool { return k == key }))
		}
		for _, p := range s.pods {
			if p.worker == at {
				w.pod(p.target, proto, historyVIP)
			}
		}
	}
	flows := w.model.Flows
	w.model = w.network.model(s.t)
	if w.model.Flows = flows; gone != nil {
		for _, table := range []map[model.Flow]*model.Entry{flows.Confirmed, flows.Pending} {
			for key, entry := range table {
				if entry.Pod == gone.target {
					delete(table, key)
				}
			}
		}
	}
}

// plan is what LB nodes are told.
func (s *shard) plan() lb.Plan {
	var backends []lb.Backend
	for _, p := range s.pods {
		node := "w0"
		if p.worker != worker4 {
			node = "w1"
		}
		backends = append(backends, lb.Backend{Node: node, Weight: 1, State: p.state, ID: lb.BackendID{Target: p.target, Tunnel: p.worker, Mode: lb.ModeGeneve, UID: p.uid}})
	}
	slices.SortFunc(backends, func(a, b lb.Backend) int { return a.ID.Target.Compare(b.ID.Target) })
	plan := lb.Plan{Node: "lb", LoadBalancer: true}
	for _, proto := range []lb.Protocol{lb.TCP, lb.UDP} {
		plan.Frontends = append(plan.Frontends, lb.Frontend{ID: lb.FrontendID{VIP: vip4, Port: 80, Protocol: proto}, Mode: lb.ModeGeneve,
			TableSize: maglev.SizeFor(len(backends), 30), Backends: backends})
	}
	return plan
}

// apply makes an LB node what is so now, and its model what its maps say.
func (s *shard) apply(l *lbTwin) {
	s.now = s.now.Add(time.Second)
	must(s.t, l.balancer.set(s.plan(), l.hops, s.now))
	s.learn(l)
}

// learn keeps what the model remembers, and reads what the maps say.
func (s *shard) learn(l *lbTwin) {
	told := l.network.model(s.t)
	l.model.VIPs, l.model.Services, l.model.Backends = told.VIPs, told.Services, told.Backends
}

// census tells an LB node what the workers' models own.
func (s *shard) census(l *lbTwin) {
	s.now = s.now.Add(11 * time.Second)
	answers := Answers{}
	for id, f := range l.balancer.frontends {
		answers[id] = map[lb.BackendID]slots.Answer{}
		for _, b := range f.applied.Backends {
			owns := make([]uint64, 1<<f.bits/64)
			flows := s.workers[b.ID.Tunnel].model.Flows
			for _, table := range []map[model.Flow]*model.Entry{flows.Confirmed, flows.Pending} {
				for key, entry := range table {
					if entry.Pod == b.ID.Target && !entry.Closed && lb.Protocol(key.Proto) == id.Protocol {
						slot := entry.Hash >> (64 - f.bits)
						owns[slot/64] |= 1 << (slot % 64)
					}
				}
			}
			answers[id][b.ID] = slots.Answer{Asked: s.now, Owns: owns}
		}
	}
	must(s.t, l.balancer.census(answers, s.now))
	s.learn(l)
}

// change lets a Pod come, begin to leave, fail, return, or go.
func (s *shard) change() {
	i := s.random.IntN(len(s.pods))
	switch p := s.pods[i]; s.random.IntN(5) {
	case 0:
		if len(s.pods) < 12 {
			s.addPod()
		}
	case 1:
		p.state = lb.Draining
	case 2:
		p.state = lb.Failing
	case 3:
		p.state = lb.Active
	case 4:
		if len(s.pods) > 2 {
			s.pods = slices.Delete(s.pods, i, i+1)
			s.tellWorker(p.worker, p)
		}
	}
	for _, l := range s.lbs {
		if s.random.IntN(3) > 0 { // the other one is late
			s.apply(l)
		}
	}
}

// send lets a flow's client send what is next, by either LB node; frames go on
// from program to program until one delivers or drops.
func (s *shard) send(f *historyFlow) {
	segment := model.Segment{Seq: f.seq, Ack: 501, Flags: tcpACK, Window: 1000}
	if f.key.Proto == protoTCP && !f.begun {
		f.seq = s.random.Uint32()
		segment = model.Segment{Seq: f.seq, Flags: tcpSYN, Window: 1000}
	}
	l := s.lbs[s.random.IntN(2)]
	frame := segmentFrame(f.key.Client, f.key.VIP, f.key.Proto, segment)
	for hops := 0; hops < 24; hops++ {
		decision, out := l.receive(s.t, frame)
		s.seen["lb "+string(decision.Verdict)+" "+string(decision.Reason)]++
		if decision.Verdict != model.Forward {
			return
		}
		to, err := destination(out)
		must(s.t, err)
		worker := s.workers[to]
		if worker == nil {
			s.t.Fatalf("sent to %s", to)
		}
		decision, out = worker.receive(s.t, out)
		s.seen["worker "+string(decision.Verdict)+" "+string(decision.Reason)]++
		if decision.Verdict == model.Deliver {
			s.answer(worker, f, decision.Pod, segment.Flags == tcpSYN)
			return
		}
		if decision.Verdict != model.Deny {
			return
		}
		frame = out
	}
	s.t.Fatal("a frame goes round for ever")
}

// answer is the Pod's.
func (s *shard) answer(w *twin, f *historyFlow, pod netip.AddrPort, syn bool) {
	segment := model.Segment{Seq: 501, End: 501, Ack: f.seq, Window: 1000, Flags: tcpACK}
	if syn {
		segment = model.Segment{Seq: 500, End: 501, Ack: f.seq + 1, Window: 1000, Flags: tcpSYN | tcpACK}
	}
	if _, _, err := w.FairleadEgress.Test(segmentFrame(pod, f.key.Client, f.key.Proto, segment)); err != nil {
		s.t.Fatal(err)
	}
	w.model.Answer(f.key, pod, segment, w.quietMoment(s.t))
	if syn {
		f.begun, f.seq = true, f.seq+1
	}
}

// Random histories on the real programs: backends come, leave, fail, return and
// go, tables are resized, one LB node lags behind the other, flows move between
// them. At each node each decision is the model's.
func TestHistoriesOnTheRealPrograms(t *testing.T) {
	for seed := range uint64(3) {
		s := newShard(t, seed)
		for range 6000 {
			switch p := s.random.IntN(100); {
			case p == 0:
				s.change()
			case p == 1:
				s.census(s.lbs[s.random.IntN(2)])
			case p < 5: // a client begins anew from the same port
				f := s.flows[s.random.IntN(len(s.flows))]
				f.begun = false
			default:
				s.send(s.flows[s.random.IntN(len(s.flows))])
			}
		}
		for _, w := range s.workers {
			w.compareFlows(t)
		}
		for _, kind := range []string{"lb forward ", "worker deliver ", "worker deny ", "lb drop unowned"} {
			if s.seen[kind] < 20 {
				t.Errorf("seed %d: %q %d times: %v", seed, kind, s.seen[kind], s.seen)
			}
		}
		t.Log(s.seen)
	}
}
