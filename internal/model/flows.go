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
	Affine bool // its Pod keeps the client

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
	// Clients are whose a client is, by its flow without its port.
	Clients map[Flow]*Client
}

// Client is a client that affinity keeps.
type Client struct {
	Pod   netip.AddrPort
	Lasts time.Duration
	Hash  uint64
	Seen  time.Duration
}

func ofClient(key Flow) Flow {
	key.Client = netip.AddrPortFrom(key.Client.Addr(), 0)
	return key
}

// ownerOf returns the Pod that has a flow's client.
func (n *Node) ownerOf(key Flow, now time.Duration) (Target, bool) {
	c := n.Flows.Clients[ofClient(key)]
	if c == nil || now-c.Seen >= c.Lasts {
		return Target{}, false
	}
	owner := Target{c.Pod, key.Proto}
	return owner, n.Affinity[owner][key.VIP] > 0
}

// keep notes that the Pod of a flow has its client, unless another has.
func (n *Node) keep(key Flow, e *Entry, now time.Duration) {
	if !e.Affine || e.pending() && key.Proto != UDP {
		return
	}
	c := n.Flows.Clients[ofClient(key)]
	ours := c != nil && c.Pod == e.Pod
	lasts := n.Affinity[Target{e.Pod, key.Proto}][key.VIP]
	if ours && now-c.Seen < time.Second || lasts == 0 {
		return
	}
	if _, other := n.ownerOf(key, now); other && !ours {
		return
	}
	n.Flows.Clients[ofClient(key)] = &Client{e.Pod, lasts, e.Hash, now}
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
		switch reason := n.admit(key, &target, segment, d, now); reason {
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
	key := Flow{p.src, p.dst, p.proto}
	entry := n.Flows.find(key, now)
	if (entry == nil || entry.Closed) && p.syn {
		_, owned := n.ownerOf(key, now)
		return owned
	}
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
	case e.State == HalfOpen && s.Flags&(flagSYN|flagACK|flagRST) == flagSYN:
		return true
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

// admit makes an entry for the Pod that has the client already, or when it is an
// order, for the one that was named, if it is of this node, serves the VIP, and
// has no flow of the same client by way of another VIP. The reason tunnelPod
// stands for a denial.
func (n *Node) admit(key Flow, target *Target, s Segment, d Decision, now time.Duration) Reason {
	asked, begins := d.Verb == verbAsk, key.Proto == UDP || s.Flags&(flagSYN|flagACK|flagRST) == flagSYN
	serves, ok := n.Pods[*target]
	if !ok || asked && (!begins || key.Proto == UDP) {
		return tunnelPod // a datagram may be of a flow that another node has
	}
	if !slices.Contains(serves, key.VIP) {
		if asked {
			return tunnelPod
		}
		return tunnelVIP
	}
	lasts := n.Affinity[*target][key.VIP]
	owner, follows := n.ownerOf(key, now)
	if follows = follows && begins && lasts > 0; follows {
		*target = owner
		serves = n.Pods[owner]
	}
	if asked && !follows {
		return tunnelPod
	}
	for _, vip := range serves {
		other := n.Flows.find(Flow{key.Client, vip, key.Proto}, now)
		if vip != key.VIP && other != nil && !other.Closed && other.Pod == target.Address {
			return flowConflict
		}
	}
	entry := &Entry{Pod: target.Address, State: Provisional, Hash: d.Hash, Seen: now, Affine: lasts > 0}
	switch {
	case key.Proto == UDP:
		entry.State = Unanswered
	case s.Flags&flagSYN != 0:
		entry.State = HalfOpen
	default:
		entry.PodScale = 14
	}
	if n.Flows.Pending == nil {
		n.Flows = Flows{Confirmed: map[Flow]*Entry{}, Pending: map[Flow]*Entry{}, Clients: map[Flow]*Client{}}
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
func (n *Node) Answer(key Flow, pod netip.AddrPort, s Segment, now time.Duration) bool {
	f := &n.Flows
	e := f.find(key, now)
	if e == nil || e.Pod != pod {
		return false
	}
	e.Seen = now
	n.keep(key, e, now)
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
