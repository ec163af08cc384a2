// SPDX-License-Identifier: Apache-2.0

package model

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/slots"
)

// A world is a shard in simulation: LB nodes and workers that decide as the
// model does, told of changes late and by different ways, clients that repeat
// what was lost, and an oracle that knows who owns each flow.
type world struct {
	story
	random   *rand.Rand
	now      time.Duration
	pods     []*pod
	workers  []*Node
	lbs      []*balancer
	flows    []*flow
	versions []version // of the endpoints, the newest last
	serial   uint32
	wrong    map[string]int
	last     map[netip.Addr]visit // of each client, with affinity
	kept     int                  // new flows that went where their client was
	asked    int                  // questions
	bounced  int
	pureHash bool
}

// visit is where and when a client's last new flow began, or was answered.
type visit struct {
	pod  *pod
	when time.Duration
}

// story is what may happen in a world.
type story struct {
	pods, workers, lbs int
	flows              int           // begun in the course of it
	length             time.Duration // of it
	udp                float64       // share of flows
	long               float64       // share of flows that last
	change             time.Duration // between changes of the endpoints, on average; 0: none
	roll               bool          // each change replaces the oldest Pod
	resize             bool          // changes scale from 3 to 30 and back
	lag                time.Duration // until an LB node sees a change, at most
	skip               float64       // changes that an LB node never sees
	lose               time.Duration // between losses of an LB node, on average
	restart            time.Duration // between restarts of one, or all
	repeat             float64       // SYNs that are repeated though they arrived
	loss               float64       // packets lost
	kill               float64       // changes that kill a Pod without warning
	silent             float64       // censuses that a node does not answer
	affinity           time.Duration // of the service; 0: none
	clients            int           // addresses that flows come from; 0: many flows of few
}

type pod struct {
	address  netip.AddrPort
	worker   int
	uid      uint32
	state    podState
	draining time.Duration
}

type podState uint8

const (
	active podState = iota
	draining
	dead
)

// version is the endpoints at one moment: what LB nodes are told.
type version struct {
	at     time.Duration
	states map[*pod]podState
}

// balancer is an LB node with what its agent knows.
type balancer struct {
	node     *Node
	up       bool
	seen     int // versions
	due      time.Duration
	table    slots.Table
	numbers  map[*pod]uint32
	byNumber map[uint32]*pod
	answered map[uint32]bool
	next     uint32
	changed  time.Duration
	asked    time.Duration
}

// flow is one of a client's, and what the oracle knows about it.
type flow struct {
	key     Flow
	owner   *pod
	begun   bool // the handshake is over, or the first datagram was answered
	over    bool
	visited bool   // its client's visit is noted
	sent    uint32 // the client's next sequence number
	acked   uint32
	isn     uint32 // the Pod's
	next    time.Duration
	since   time.Duration // what is under way was first sent
	retries int
	left    int // messages
	pause   time.Duration
}

var (
	simVIP  = netip.MustParseAddrPort("192.0.2.1:80")
	simPort = uint16(8080)
)

func newWorld(s story, seed uint64) *world {
	w := &world{story: s, random: rand.New(rand.NewPCG(seed, 1)), wrong: map[string]int{}, last: map[netip.Addr]visit{}}
	for range s.workers {
		w.workers = append(w.workers, &Node{Backend: true, Pods: map[Target][]netip.AddrPort{}, Affinity: map[Target]map[netip.AddrPort]time.Duration{}})
	}
	for range s.pods {
		w.addPod()
	}
	w.publish()
	for range s.lbs {
		b := &balancer{}
		w.lbs = append(w.lbs, b)
		w.start(b)
	}
	return w
}

func (w *world) addPod() *pod {
	w.serial++
	// Addresses come back, as other Pods'.
	p := &pod{worker: w.random.IntN(len(w.workers)), uid: w.serial}
	taken := map[netip.AddrPort]bool{}
	for _, other := range w.pods {
		if other.state != dead {
			taken[other.address] = true
		}
	}
	for p.address = w.randomAddress(p.worker); taken[p.address]; p.address = w.randomAddress(p.worker) {
	}
	w.pods = append(w.pods, p)
	for _, proto := range []uint8{TCP, UDP} {
		w.workers[p.worker].Pods[Target{p.address, proto}] = []netip.AddrPort{simVIP}
		w.workers[p.worker].Affinity[Target{p.address, proto}] = map[netip.AddrPort]time.Duration{simVIP: w.affinity}
	}
	return p
}

func (w *world) randomAddress(worker int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(worker), byte(1 + w.random.IntN(60))}), simPort)
}

// kill ends a Pod: its worker forgets it and its flows at once.
func (w *world) kill(p *pod) {
	p.state = dead
	worker := w.workers[p.worker]
	for _, proto := range []uint8{TCP, UDP} {
		delete(worker.Pods, Target{p.address, proto})
		delete(worker.Affinity, Target{p.address, proto})
	}
	for _, table := range []map[Flow]*Entry{worker.Flows.Confirmed, worker.Flows.Pending} {
		for key, entry := range table {
			if entry.Pod == p.address {
				delete(table, key)
			}
		}
	}
	for _, f := range w.flows {
		if f.owner == p {
			f.over = true // with its Pod
		}
	}
}

func (w *world) living(state podState) (all []*pod) {
	for _, p := range w.pods {
		if p.state == state {
			all = append(all, p)
		}
	}
	return all
}

// publish makes what is so known to LB nodes, in time.
func (w *world) publish() {
	v := version{at: w.now, states: map[*pod]podState{}}
	for _, p := range w.pods {
		if p.state != dead {
			v.states[p] = p.state
		}
	}
	w.versions = append(w.versions, v)
	for _, b := range w.lbs {
		if w.random.Float64() >= w.skip {
			b.due = w.now + time.Duration(w.random.Float64()*float64(w.lag))
		}
	}
}

// start begins an LB node from nothing but the endpoints, and a census.
func (w *world) start(b *balancer) {
	*b = balancer{up: true, numbers: map[*pod]uint32{}, byNumber: map[uint32]*pod{}, answered: map[uint32]bool{}, next: 1,
		node: &Node{LB: true, Key: flowhash.Secret{9}.FlowKey(), VIPs: map[netip.Addr]bool{simVIP.Addr(): true}, Services: map[Front]Service{}, Backends: map[uint32]Backend{}}}
	w.apply(b)
	w.census(b)
}

// apply makes an LB node what the newest version says.
func (w *world) apply(b *balancer) {
	b.seen = len(w.versions)
	v := w.versions[b.seen-1]
	for _, p := range w.pods {
		if _, ok := v.states[p]; ok && b.numbers[p] == 0 {
			b.numbers[p], b.byNumber[b.next] = b.next, p
			b.next++
		}
	}
	gone := func(number uint32) bool {
		_, ok := v.states[b.byNumber[number]]
		return number != 0 && !ok
	}
	clear(b.node.Backends)
	var takers []*pod
	for p, state := range v.states {
		b.node.Backends[b.numbers[p]] = Backend{Mode: Geneve, Target: p.address, Outer: 76, MTU: 9000, Active: state == active, Usable: true, Owns: true, Generation: p.uid}
		if state == active {
			takers = append(takers, p)
		}
	}
	slices.SortFunc(takers, func(x, y *pod) int { return int(x.uid) - int(y.uid) })
	if w.pureHash {
		b.table = slots.Table{}
	}
	owners := rendezvous(takers, len(v.states), b.numbers)
	before := make([]uint32, b.table.Len())
	for i := range before {
		before[i] = b.table.Owner(uint32(i))
	}
	if !slices.Equal(before, owners) {
		b.changed = w.now
	}
	b.table.Change(owners, gone, at(w.now))
	w.program(b)
}

func at(d time.Duration) time.Time { return time.Unix(1000, 0).Add(d) }

// rendezvous is a table that moves as little as Maglev's does, and is slower.
func rendezvous(takers []*pod, all int, numbers map[*pod]uint32) []uint32 {
	size := 64
	for size < 8*all {
		size *= 4
	}
	owners := make([]uint32, size)
	for slot := range owners {
		best := uint64(0)
		for _, p := range takers {
			a := p.address.Addr().As4()
			x := uint64(binary.BigEndian.Uint32(a[:]))<<32 | uint64(slot)*64/uint64(size)<<16 | uint64(slot%(size/64))
			x ^= x >> 31
			x *= 0x9e3779b97f4a7c15
			x ^= x >> 29
			x *= 0xbf58476d1ce4e5b9
			if x ^= x >> 32; x >= best {
				best, owners[slot] = x, numbers[p]
			}
		}
	}
	return owners
}

// program writes the table where the node decides by it.
func (w *world) program(b *balancer) {
	var suspects []uint32
	if !w.pureHash {
		for p := range w.versions[b.seen-1].states {
			if number := b.numbers[p]; !b.answered[number] {
				suspects = append(suspects, number)
			}
		}
		slices.Sort(suspects)
	}
	b.table.Suspect(suspects)
	service := Service{Number: 1, Candidates: map[uint32][]uint32{}, Affinity: w.affinity > 0}
	for slot := range uint32(b.table.Len()) {
		service.Slots = append(service.Slots, b.table.Owner(slot))
		for _, c := range b.table.Candidates(slot) {
			if c != 0 {
				service.Candidates[slot] = append(service.Candidates[slot], c)
			}
		}
	}
	for _, proto := range []uint8{TCP, UDP} {
		b.node.Services[Front{simVIP, proto}] = service
	}
}

// census asks the workers, unless they are silent, who owns what.
func (w *world) census(b *balancer) {
	b.asked = w.now
	if w.pureHash {
		return
	}
	answers := map[uint32]slots.Answer{}
	silent := map[int]bool{}
	for i := range w.workers {
		silent[i] = w.random.Float64() < w.silent
	}
	for p := range w.versions[b.seen-1].states {
		if silent[p.worker] {
			continue
		}
		owns := make([]uint64, max(b.table.Len()/64, 1))
		flows := &w.workers[p.worker].Flows
		for _, table := range []map[Flow]*Entry{flows.Confirmed, flows.Pending} {
			for _, entry := range table {
				if entry.Pod == p.address && !entry.Closed {
					slot := entry.Hash >> (64 - uint(log2(64*len(owns))))
					owns[slot/64] |= 1 << (slot % 64)
				}
			}
		}
		for key, c := range flows.Clients {
			if c.Pod == p.address && w.now-c.Seen < c.Lasts && w.workers[p.worker].Affinity[Target{c.Pod, key.Proto}] != nil {
				slot := c.Hash >> (64 - uint(log2(64*len(owns))))
				owns[slot/64] |= 1 << (slot % 64)
			}
		}
		answers[b.numbers[p]] = slots.Answer{Asked: at(w.now), Owns: owns}
		b.answered[b.numbers[p]] = true
	}
	b.table.Census(answers)
	w.program(b)
}

func log2(n int) (l int) {
	for ; n > 1; n /= 2 {
		l++
	}
	return l
}
