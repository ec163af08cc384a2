// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"slices"
	"time"
)

// Flow is what the client sees of a flow.
type Flow struct {
	Client, VIP netip.AddrPort
	Proto       uint8
}

// State is how far a flow is.
type State uint8

// The states; those up to Provisional are pending, and in a table of their own.
const (
	HalfOpen    State = iota + 1 // a SYN was delivered
	Unanswered                   // UDP was delivered
	Provisional                  // other TCP was delivered
	Established
	Closing
)

// Entry is what the backend's node knows about a flow.
type Entry struct {
	Pod    netip.AddrPort
	State  State
	Closed bool // claims nothing: a SYN begins anew
	Hash   uint64
	Seen   time.Duration

	// TCP, in the Pod's view.
	SYNACK            bool // PodISN is known
	FINClient, FINPod bool
	FINPodAcked       bool
	PodISN, PodAck    uint32
	PodSeq, PodWindow uint32
	PodScale          uint8
	ClientFIN, PodFIN uint32
}

func (e *Entry) pending() bool { return e.State < Established }

// Flows are the truth at the backend's node.
type Flows struct {
	Confirmed, Pending map[Flow]*Entry
}

func (f *Flows) find(key Flow, now time.Duration) *Entry {
	entry := f.Confirmed[key]
	if entry != nil && !entry.Closed {
		return entry
	}
	if fresh := f.Pending[key]; fresh != nil && now-fresh.Seen < pendingAge {
		return fresh
	}
	return entry
}

// deliver gives a packet, with the flow as the client has it, to a Pod of this
// node: the flow's, or when it is an order, the one that was named. A question
// about a flow that this node does not have is denied, and so is an order to a
// Pod that it does not know.
func (n *Node) deliver(frame []byte, p packet, target Target, d Decision, now time.Duration) Decision {
	var segment Segment
	headers := !p.icmpError && p.proto == TCP && !p.later
	if headers {
		var ok bool
		if segment, ok = p.segment(frame); !ok {
			return dropped(d, malformed)
		}
	}
	deny := func() Decision {
		d.Verdict = Deny
		return d
	}
	key := Flow{p.src, p.dst, p.proto}
	entry := n.Flows.find(key, now)
	switch {
	case p.icmpError && (entry == nil || entry.Closed):
		if d.Verb == verbAsk {
			return deny()
		}
		return dropped(d, icmpUnrelated)
	case p.icmpError:
		d.Pod = entry.Pod
	case entry == nil || p.proto == TCP && entry.Closed && segment.Flags&(flagSYN|flagACK|flagRST) == flagSYN:
		if d.Verb == verbAsk {
			return deny()
		}
		switch reason := n.admit(key, target, segment, d.Hash, now); reason {
		case "":
		case tunnelPod:
			return deny()
		default:
			return dropped(d, reason)
		}
		d.Pod = target.Address
	case d.Verb == verbAsk && headers && !entry.claims(segment):
		return deny()
	default:
		d.Pod = entry.Pod
		n.Flows.fromClient(key, entry, segment, now)
	}
	d.Verdict = Deliver
	return d
}

// ownedHere says whether a Pod of this node owns the packet's flow.
func (n *Node) ownedHere(frame []byte, p packet, now time.Duration) bool {
	entry := n.Flows.find(Flow{p.src, p.dst, p.proto}, now)
	if entry == nil {
		return false
	}
	if p.proto != TCP || p.icmpError || p.later {
		return !entry.Closed
	}
	segment, ok := p.segment(frame)
	return ok && entry.claims(segment)
}

// repeats is how far behind what the Pod acknowledged a segment may be.
const repeats = 1 << 20

// claims says whether a segment can be of the connection.
func (e *Entry) claims(s Segment) bool {
	ahead, behind := s.End-e.PodAck, e.PodAck-s.Seq
	switch {
	case e.State == HalfOpen && !e.SYNACK:
		return false
	case e.State == HalfOpen && s.Flags&flagRST != 0:
		return s.Seq == e.PodAck
	case e.State == HalfOpen:
		return s.Flags&flagACK != 0 && s.Ack == e.PodISN+1
	case e.Closed:
		return e.FINClient && (s.End == e.ClientFIN || s.Seq == e.ClientFIN)
	}
	return e.State == Provisional || ahead <= e.PodWindow+1 || behind <= max(e.PodWindow, repeats)
}

// admit makes an entry for the Pod that was named, if it is of this node,
// serves the VIP, and has no flow of the same client by way of another VIP.
func (n *Node) admit(key Flow, target Target, s Segment, hash uint64, now time.Duration) Reason {
	serves, ok := n.Pods[target]
	if !ok {
		return tunnelPod
	}
	if !slices.Contains(serves, key.VIP) {
		return tunnelVIP
	}
	for _, vip := range serves {
		other := n.Flows.find(Flow{key.Client, vip, key.Proto}, now)
		if vip != key.VIP && other != nil && !other.Closed && other.Pod == target.Address {
			return flowConflict
		}
	}
	entry := &Entry{Pod: target.Address, State: Provisional, Hash: hash, Seen: now}
	switch {
	case key.Proto == UDP:
		entry.State = Unanswered
	case s.Flags&flagSYN != 0:
		entry.State = HalfOpen
	default:
		entry.PodScale = 14
	}
	if n.Flows.Pending == nil {
		n.Flows = Flows{Confirmed: map[Flow]*Entry{}, Pending: map[Flow]*Entry{}}
	}
	n.Flows.Pending[key] = entry
	return ""
}

// fromClient notes what a client's packet tells of its flow.
func (f *Flows) fromClient(key Flow, e *Entry, s Segment, now time.Duration) {
	e.Seen = now
	switch {
	case key.Proto == UDP:
	case e.pending():
		// Only the ACK of exactly this entry's SYN-ACK proves the connection.
		if e.State == HalfOpen && e.SYNACK && s.Flags&(flagSYN|flagACK) == flagACK && s.Ack == e.PodISN+1 {
			f.confirm(key, e)
		}
	case s.Flags&flagRST != 0:
		if s.Seq == e.PodAck {
			e.close()
		}
	case s.End-e.PodAck <= e.PodWindow+1:
		if s.Flags&flagFIN != 0 {
			e.ClientFIN, e.FINClient = s.End, true
		}
		if s.Flags&flagACK != 0 && e.FINPod && s.Ack == e.PodFIN {
			e.FINPodAcked = true
			e.closeIfDone()
		}
	}
}

// Answer notes what a Pod's packet tells of its flow, and returns whether it
// has one.
func (f *Flows) Answer(key Flow, pod netip.AddrPort, s Segment, now time.Duration) bool {
	e := f.find(key, now)
	if e == nil || e.Pod != pod {
		return false
	}
	e.Seen = now
	switch {
	case key.Proto == UDP:
		if e.pending() {
			f.confirm(key, e)
		}
		return true
	case s.Flags&(flagSYN|flagACK) == flagSYN|flagACK:
		e.PodISN, e.PodSeq, e.PodAck = s.Seq, s.End, s.Ack
		e.PodScale, e.PodWindow, e.SYNACK = s.Scale, uint32(s.Window), true
	default:
		e.fromPod(s)
	}
	if e.State == Provisional && s.Flags&flagRST == 0 {
		f.confirm(key, e)
	}
	return true
}

func (e *Entry) fromPod(s Segment) {
	if s.Flags&flagRST != 0 {
		if !e.pending() {
			e.close()
		}
		return
	}
	if s.Flags&flagACK == 0 {
		return
	}
	if e.pending() || int32(s.Ack-e.PodAck) > 0 {
		e.PodAck = s.Ack
	}
	if e.pending() || int32(s.End-e.PodSeq) > 0 {
		e.PodSeq = s.End
	}
	e.PodWindow = uint32(s.Window) << (e.PodScale & 15)
	if e.pending() {
		return
	}
	if s.Flags&flagFIN != 0 {
		e.PodFIN, e.FINPod, e.State = s.End, true, Closing
	}
	if e.FINClient && e.PodAck == e.ClientFIN {
		e.State = Closing
		e.closeIfDone()
	}
}

// confirm moves a pending entry to the confirmed ones.
func (f *Flows) confirm(key Flow, e *Entry) {
	if old := f.Confirmed[key]; old == nil || old.Closed {
		confirmed := *e
		confirmed.State = Established
		f.Confirmed[key] = &confirmed
	}
	delete(f.Pending, key)
}

func (e *Entry) close() { e.State, e.Closed = Closing, true }

func (e *Entry) closeIfDone() {
	if e.FINPodAcked && e.FINClient && e.PodAck == e.ClientFIN {
		e.close()
	}
}
