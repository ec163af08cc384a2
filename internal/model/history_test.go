// SPDX-License-Identifier: Apache-2.0

package model

import (
	"encoding/binary"
	"flag"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"
)

var histories = flag.Int("histories", 20, "how many histories of each story are played")

const (
	step      = 50 * time.Millisecond
	firstWait = 200 * time.Millisecond // until a client repeats itself, and twice as long each time
	longWait  = 20 * time.Second       // after which it gives up
)

// play runs a world to its end.
func (w *world) play() {
	begin := w.length / time.Duration(w.story.flows)
	for ; w.now < w.length; w.now += step {
		for len(w.flows) < w.story.flows && time.Duration(len(w.flows))*begin <= w.now {
			w.begin()
		}
		w.happen()
		for _, b := range w.lbs {
			w.tend(b)
		}
		for _, f := range w.flows {
			if !f.over && f.next <= w.now {
				w.move(f)
			}
		}
	}
}

// chance says whether something that happens every so often happens now.
func (w *world) chance(every time.Duration) bool {
	return every > 0 && w.random.Float64() < float64(step)/float64(every)
}

// happen lets the world change.
func (w *world) happen() {
	if w.chance(w.change) {
		w.changePods()
		w.publish()
	}
	if w.chance(w.lose) {
		b := w.lbs[w.random.IntN(len(w.lbs))]
		if b.up = !b.up; b.up {
			w.start(b)
		}
		if !slices.ContainsFunc(w.lbs, func(b *balancer) bool { return b.up }) {
			w.start(w.lbs[0])
		}
	}
	if w.chance(w.restart) {
		all := w.random.IntN(3) == 0
		for i, b := range w.lbs {
			if b.up && (all || i == w.random.IntN(len(w.lbs))) {
				w.start(b)
			}
		}
	}
	for _, p := range w.living(draining) {
		if w.now-p.draining > 60*time.Second && !w.owns(p) {
			w.kill(p) // it ends when it has nothing to do
			w.publish()
		}
	}
}

func (w *world) owns(p *pod) bool {
	return slices.ContainsFunc(w.flows, func(f *flow) bool { return !f.over && f.owner == p })
}

func (w *world) changePods() {
	living := w.living(active)
	if w.random.Float64() < w.story.kill && len(living) > 1 {
		w.kill(living[w.random.IntN(len(living))])
		return
	}
	add, remove := 1, 1
	if w.resize {
		if len(living) < 10 {
			add, remove = 27, 0
		} else {
			add, remove = 0, len(living)-3
		}
	} else if !w.roll {
		add, remove = w.random.IntN(3), w.random.IntN(3)
	}
	for range add {
		w.addPod()
	}
	if remove >= len(living) {
		remove = len(living) - min(1, len(living)) // somebody stays
	}
	for _, p := range living[:remove] {
		p.state, p.draining = draining, w.now
		for _, proto := range []uint8{TCP, UDP} {
			delete(w.workers[p.worker].Affinity, Target{p.address, proto})
		}
	}
}

// tend does what an LB node's agent does.
func (w *world) tend(b *balancer) {
	if !b.up {
		return
	}
	if b.seen < len(w.versions) && b.due <= w.now {
		w.apply(b)
	}
	since, contested := w.now-b.changed, b.table.Contested() > 0
	for _, after := range []time.Duration{2 * time.Second, 11 * time.Second} {
		if b.asked < b.changed+after && since >= after {
			w.census(b)
		}
	}
	if contested && w.now-b.asked >= 30*time.Second || w.unknown(b) && w.now-b.asked >= time.Second {
		w.census(b)
	}
}

func (w *world) unknown(b *balancer) bool {
	for p := range w.versions[b.seen-1].states {
		if !b.answered[b.numbers[p]] {
			return true
		}
	}
	return false
}

// begin lets a client begin a flow; ports come back after a while.
func (w *world) begin() {
	f := &flow{next: w.now, left: 2 + w.random.IntN(10), pause: time.Second, sent: w.random.Uint32(), isn: w.random.Uint32()}
	f.key = Flow{Client: netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(len(w.flows) / 500)}), uint16(1024+len(w.flows)%500)), VIP: simVIP, Proto: TCP}
	if w.clients > 0 {
		f.key.Client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(len(w.flows) % w.clients)}), uint16(1024+len(w.flows)))
	}
	if w.random.Float64() < w.udp {
		f.key.Proto = UDP
	}
	if w.random.Float64() < w.long {
		f.left, f.pause = 40+w.random.IntN(100), 3*time.Second
	}
	w.flows = append(w.flows, f)
}

// move lets a flow's client send what is next, or again.
func (w *world) move(f *flow) {
	if f.retries == 0 {
		f.since = w.now
	}
	if w.now-f.since > longWait {
		w.wrong["gave up"]++
		f.over = true
		return
	}
	flags := uint8(flagACK)
	if f.key.Proto == TCP && !f.begun {
		flags = flagSYN
	}
	answered := w.send(f, flags)
	if answered && flags == flagSYN && w.random.Float64() < w.repeat {
		w.send(f, flagSYN) // by whichever way
	}
	if f.over {
		return
	}
	if !answered {
		f.next = w.now + firstWait<<min(f.retries, 6)
		f.retries++
		return
	}
	if waited := w.now - f.since; f.begun && waited > 4*time.Second {
		w.wrong["waited more than 4 s"]++
	}
	f.retries = 0
	if flags == flagSYN {
		f.begun, f.acked = true, f.isn+1
		f.sent++
		f.next = w.now
		return
	}
	w.visit(f)
	f.begun, f.visited = true, true
	f.sent += 10
	f.next = w.now + time.Duration(float64(f.pause)*(0.5+w.random.Float64()))
	if f.left--; f.left == 0 {
		f.over = true
	}
}

// visit compares, for each new flow, with where its client was last.
func (w *world) visit(f *flow) {
	if w.affinity == 0 || f.key.Proto != TCP {
		return
	}
	client := f.key.Client.Addr()
	last, known := w.last[client]
	valid := known && last.pod.state == active && w.now-last.when < w.affinity
	switch {
	case !f.visited && valid && last.pod != f.owner && f.owner.state == active:
		w.wrong["client moved"]++
	case !f.visited && valid && last.pod == f.owner:
		w.kept++
	}
	if !f.visited || !valid || last.pod == f.owner {
		w.last[client] = visit{f.owner, w.now}
	}
}

// way is the LB node that a packet meets: by ECMP over those that are up.
func (w *world) way(f *flow) *balancer {
	up := make([]*balancer, 0, len(w.lbs))
	for _, b := range w.lbs {
		if b.up {
			up = append(up, b)
		}
	}
	return up[int(f.key.Client.Port())%len(up)]
}

// send sends one packet of a flow all its way, and says whether it was answered.
func (w *world) send(f *flow, flags uint8) bool {
	if w.random.Float64() < w.loss {
		return false
	}
	frame, p := f.packet(flags)
	b := w.way(f)
	d := b.node.balance(frame, p, w.now)
	p.bounced = true
	for d.Verdict == Forward {
		target := b.byNumber[d.Backend]
		worker := w.workers[target.worker]
		w.asked++
		reply := worker.deliver(frame, p, Target{b.node.Backends[d.Backend].Target, f.key.Proto}, Decision{Hash: d.Hash, Verb: d.Verb}, w.now)
		if reply.Verdict == Deliver {
			return w.answer(f, worker, target.worker, reply.Pod, flags)
		}
		if reply.Verdict != Deny || w.random.Float64() < w.loss {
			return false
		}
		w.bounced++
		a, _ := b.node.locate(b.node.Services[Front{simVIP, f.key.Proto}], p, d.Hash)
		d = b.node.denied(frame, p, a, d.Backend, d.Attempt, w.now)
	}
	return false
}

// answer is what the Pod that got the packet does; the oracle looks on.
func (w *world) answer(f *flow, worker *Node, at int, address netip.AddrPort, flags uint8) bool {
	i := slices.IndexFunc(w.pods, func(p *pod) bool { return p.state != dead && p.worker == at && p.address == address })
	if i < 0 {
		w.wrong["to a Pod that is gone"]++
		return false
	}
	got := w.pods[i]
	switch {
	case f.key.Proto == UDP && f.begun && f.owner != got:
		w.wrong["UDP moved"]++
		f.owner = got
	case flags == flagSYN && !f.begun:
		f.owner = got // the last SYN-ACK counts: the client answers that one
	case f.key.Proto == TCP && flags != flagSYN && f.owner != got:
		w.wrong["reset"]++
		f.over = true
		worker.Answer(f.key, address, Segment{Flags: flagRST}, w.now)
		return true
	}
	if f.owner == nil {
		f.owner = got
	}
	segment := Segment{Seq: f.acked, End: f.acked + 5, Ack: f.sent + 10, Window: 60000, Flags: flagACK}
	if flags == flagSYN {
		segment = Segment{Seq: f.isn, End: f.isn + 1, Ack: f.sent + 1, Window: 60000, Flags: flagSYN | flagACK}
	}
	worker.Answer(f.key, address, segment, w.now)
	return true
}

// packet is the frame and what is parsed of it.
func (f *flow) packet(flags uint8) ([]byte, packet) {
	frame := make([]byte, 14+20+20+10)
	frame[12], frame[13] = 8, 0
	ip, l4 := frame[14:], frame[34:]
	ip[0], ip[8], ip[9] = 0x45, 60, f.key.Proto
	length := 20 + 20
	if flags != flagSYN {
		length += 10
	}
	binary.BigEndian.PutUint16(ip[2:], uint16(length))
	copy(ip[12:], f.key.Client.Addr().AsSlice())
	copy(ip[16:], simVIP.Addr().AsSlice())
	binary.BigEndian.PutUint16(l4, f.key.Client.Port())
	binary.BigEndian.PutUint16(l4[2:], simVIP.Port())
	if f.key.Proto == TCP {
		binary.BigEndian.PutUint32(l4[4:], f.sent)
		binary.BigEndian.PutUint32(l4[8:], f.acked)
		l4[12], l4[13] = 5<<4, flags
	}
	p, _ := parseAddresses(frame)
	parsed, _ := p.parseTransport(frame, false)
	return frame, p.with(parsed)
}

func (p packet) with(parsed packet) packet { return parsed }

var plain = story{pods: 20, workers: 6, lbs: 4, flows: 600, length: 400 * time.Second, long: 0.2}

// stories: in the first ones nothing may go wrong; in the last ones anything
// may happen, and little may go wrong.
var stories = []struct {
	name string
	edit func(*story)
	most float64 // of the flows may break
}{
	{"nothing changes", func(s *story) {}, 0},
	{"rolling update", func(s *story) { s.change, s.roll = 10*time.Second, true }, 0},
	{"rolling update, an LB node lost and back", func(s *story) { s.change, s.roll, s.lose = 10*time.Second, true, 60*time.Second }, 0},
	{"rolling update, all LB nodes restarted", func(s *story) { s.change, s.roll, s.restart = 10*time.Second, true, 40*time.Second }, 0},
	{"half of the flows UDP", func(s *story) { s.change, s.roll, s.lose, s.udp = 10*time.Second, true, 60*time.Second, 0.5 }, 0},
	{"repeated SYNs", func(s *story) { s.change, s.roll, s.repeat, s.lag = 10*time.Second, true, 0.3, time.Second }, 0},
	{"3 to 30 to 3", func(s *story) { s.pods, s.resize, s.change = 3, true, 50*time.Second }, 0.0002},
	{"affinity, rolling update, an LB node lost and back", func(s *story) {
		s.affinity, s.clients, s.change, s.roll, s.lose, s.udp = time.Hour, 60, 10*time.Second, true, 60*time.Second, 0.3
	}, 0.0005}, // a client may be known to none of the 8 backends of its slot
	{"affinity, 3 to 30 to 3", func(s *story) {
		s.affinity, s.clients, s.pods, s.resize, s.change = time.Hour, 200, 3, true, 50*time.Second
	}, 0.0005},
	{"everything at once", func(s *story) {
		s.change, s.lose, s.restart, s.udp, s.repeat = 8*time.Second, 80*time.Second, 80*time.Second, 0.3, 0.1
		s.lag, s.skip, s.loss, s.kill, s.silent = 2*time.Second, 0.1, 0.01, 0.1, 0.1
	}, 0.0002},
}

// TestHistories plays random histories. Go test -histories=1000 plays more.
func TestHistories(t *testing.T) {
	for _, s := range stories {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			play := plain
			s.edit(&play)
			flows, kept, asked, bounced, wrong, seeds := 0, 0, 0, 0, map[string]int{}, []uint64{}
			for seed := range uint64(*histories) {
				w := newWorld(play, seed)
				w.play()
				flows, kept, asked, bounced = flows+len(w.flows), kept+w.kept, asked+w.asked, bounced+w.bounced
				if len(w.wrong) > 0 {
					seeds = append(seeds, seed)
				}
				for kind, n := range w.wrong {
					wrong[kind] += n
				}
			}
			broken := wrong["client moved"] + wrong["reset"] + wrong["gave up"] + wrong["UDP moved"] + wrong["to a Pod that is gone"]
			summary := fmt.Sprintf("%d flows, %d broken (%v), %.2f%% of packets bounced", flows, broken, wrong, 100*float64(bounced)/float64(asked))
			if play.affinity > 0 {
				summary += fmt.Sprintf(", %d followed their client", kept)
			}
			if float64(broken) > s.most*float64(flows) {
				t.Errorf("%s; seeds %v", summary, seeds)
			} else {
				t.Log(summary)
			}
		})
	}
}

// The control: a pure hash breaks flows in the same histories.
func TestHistoriesBreakAPureHash(t *testing.T) {
	for _, s := range stories[1:] {
		play := plain
		s.edit(&play)
		w := newWorld(play, 1)
		w.pureHash = true
		for _, b := range w.lbs {
			w.start(b)
		}
		w.play()
		if len(w.wrong) == 0 {
			t.Errorf("%s: nothing broke", s.name)
		}
		t.Logf("%s: of %d flows: %v", s.name, len(w.flows), maps.Collect(maps.All(w.wrong)))
	}
}
