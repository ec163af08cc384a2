// SPDX-License-Identifier: Apache-2.0

package model

import (
	"math/bits"
	"slices"
	"time"
)

// The attempts of a question, as in bpf/fairlead.h.
const (
	attemptHint      = 0
	attemptSlot      = 1
	attemptCandidate = 2
	attemptsMax      = 9
	attemptOrder     = 0x40

	unownedAge = 3 * time.Second
	busyAge    = 10 * time.Second
	staleAge   = 60 * time.Second
)

type hint struct{ backend, generation uint32 }

type denial struct {
	tag  uint16
	when time.Duration
}

// ask is a question or an order, as far as it has come.
type ask struct {
	d          Decision
	service    Service
	flow       uint64 // its own hash: the key of what is remembered about it
	own        uint32 // the flow's own slot
	candidates []uint32
}

func (n *Node) locate(s Service, p packet, hash uint64) (ask, Reason) {
	a := ask{d: Decision{Service: s.Number, Hash: hash}, service: s, flow: hash}
	if s.Affinity {
		a.flow = n.hash(p)
	}
	if len(s.Slots) == 0 {
		return a, noBackend
	}
	a.own = uint32(hash >> (64 - bits.TrailingZeros(uint(len(s.Slots)))))
	a.d.Slot, a.candidates = a.own, s.Candidates[a.own]
	return a, ""
}

func (n *Node) mayOwn(number uint32, proto uint8) bool {
	b := n.Backends[number]
	return b.Usable || proto == TCP && b.Owns
}

// hinted returns whom a hint names, if that backend was not replaced since.
func (n *Node) hinted(in map[uint64]hint, hash uint64) uint32 {
	h, ok := in[hash]
	if !ok || n.Backends[h.backend].Generation != h.generation {
		return 0
	}
	return h.backend
}

func (n *Node) writeHint(in *map[uint64]hint, hash uint64, number uint32) {
	if *in == nil {
		*in = map[uint64]hint{}
	}
	(*in)[hash] = hint{number, n.Backends[number].Generation}
}

// attempted returns who is asked in an attempt, or 0.
func (n *Node) attempted(a *ask, attempt int) uint32 {
	switch {
	case attempt == attemptSlot:
		return a.service.Slots[a.own]
	case len(a.candidates) == 0:
		return 0
	case attempt == attemptHint:
		return n.hinted(n.hints, a.flow)
	case attempt-attemptCandidate < len(a.candidates):
		return a.candidates[attempt-attemptCandidate]
	}
	return 0
}

// askFirst decides about a packet of a contested slot.
func (n *Node) askFirst(frame []byte, p packet, a *ask, now time.Duration) Reason {
	switch {
	case p.syn && (a.service.Orders || !a.service.Affinity):
		delete(n.hints, a.flow)
		reason := n.orderClient(a)
		if reason == "" && a.service.Orders {
			n.writeHint(&n.syns, a.flow, a.d.Backend)
		}
		return reason
	case p.proto == UDP && a.service.Independent:
		return n.order(a, 0)
	case a.service.Orders:
		return n.orderRecorded(p, a)
	}
	return n.askNext(frame, p, a, attemptHint, now)
}

// orderClient gives a SYN to whom its client is on record, where affinity wants
// that and there is nobody to ask; else to the slot's backend.
func (n *Node) orderClient(a *ask) Reason {
	if !a.service.Affinity {
		return n.order(a, 0)
	}
	if number := n.hinted(n.hints, a.d.Hash); number != 0 && n.Backends[number].Active {
		a.d.Verb, a.d.Attempt, a.d.Backend = verbDeliver, attemptOrder, number
		return ""
	}
	reason := n.order(a, 0)
	if reason == "" {
		n.writeHint(&n.hints, a.d.Hash, a.d.Backend)
	}
	return reason
}

// orderRecorded is for services that nobody can be asked about: who was on
// record, else the slot's backend from when the contest began.
func (n *Node) orderRecorded(p packet, a *ask) Reason {
	number := n.hinted(n.hints, a.flow)
	if number == 0 {
		if number = n.hinted(n.syns, a.flow); number != 0 {
			n.writeHint(&n.hints, a.flow, number)
		}
	}
	for _, candidate := range slices.Backward(a.candidates) {
		if number == 0 && n.mayOwn(candidate, p.proto) {
			number = candidate
			n.writeHint(&n.hints, a.flow, number)
		}
	}
	if number == 0 {
		return n.order(a, 0)
	}
	a.d.Verb, a.d.Attempt, a.d.Backend = verbDeliver, attemptOrder, number
	return ""
}

// askNext finds who is asked next, from an attempt on.
func (n *Node) askNext(frame []byte, p packet, a *ask, from int, now time.Duration) Reason {
	for attempt := from; attempt < attemptsMax; attempt++ {
		number := n.attempted(a, attempt)
		if number == 0 || !n.mayOwn(number, p.proto) || p.syn && !n.Backends[number].Active {
			continue
		}
		if n.Backends[number].Mode == Local && !n.ownedHere(frame, p, now) {
			continue
		}
		a.d.Verb, a.d.Attempt, a.d.Backend = verbAsk, uint8(attempt), number
		if attempt >= attemptCandidate {
			n.writeHint(&n.hints, a.flow, number)
		}
		return ""
	}
	return n.unowned(p, a, now)
}

// unowned decides about a flow that nobody has.
func (n *Node) unowned(p packet, a *ask, now time.Duration) Reason {
	if p.icmpError {
		return icmpUnrelated
	}
	if p.proto == TCP && !p.syn && !n.unownedLong(a.flow, now) {
		return unownedFlow
	}
	reason := n.order(a, 0)
	if reason == "" && len(a.candidates) > 0 {
		n.writeHint(&n.hints, a.flow, a.d.Backend)
	}
	return reason
}

// unownedLong says whether a flow was first denied long enough ago.
func (n *Node) unownedLong(hash uint64, now time.Duration) bool {
	now = now.Truncate(time.Millisecond)
	at, tag := uint16(hash), uint16(hash>>16)
	cell, taken := n.denials[at]
	age := now - cell.when
	if !taken {
		age = staleAge
	}
	ours := taken && cell.tag == tag
	if ours && age >= unownedAge && age < staleAge {
		return true
	}
	if ours && age >= staleAge || !ours && age >= busyAge {
		if n.denials == nil {
			n.denials = map[uint16]denial{}
		}
		n.denials[at] = denial{tag, now}
	}
	return false
}

// order gives the packet to the slot's backend, or to who stands in for it,
// skip slots further on.
func (n *Node) order(a *ask, skip uint32) Reason {
	slots := uint32(len(a.service.Slots))
	first := a.own
	if skip > 0 || !n.Backends[a.service.Slots[a.own]].Usable {
		first = a.own + max(skip, 1)
	}
	for i := range uint32(standInsMax) {
		slot := (first + i) % slots
		if number := a.service.Slots[slot]; n.Backends[number].Usable {
			a.d.Slot, a.d.Backend = slot, number
			a.d.Verb, a.d.Attempt = verbDeliver, attemptOrder|uint8(skip)
			return ""
		}
	}
	return noBackend
}

// denied makes the next attempt for a packet, after one that failed.
func (n *Node) denied(frame []byte, p packet, a ask, denier uint32, attempt uint8, now time.Duration) Decision {
	a.d.Slot = a.own
	if n.hints[a.flow].backend == denier {
		delete(n.hints, a.flow)
	}
	var reason Reason
	switch skip := attempt &^ attemptOrder; {
	case attempt&attemptOrder == 0:
		reason = n.askNext(frame, p, &a, int(attempt)+1, now)
	case skip >= standInsMax:
		reason = noBackend
	default:
		reason = n.order(&a, uint32(skip)+1)
	}
	if reason != "" {
		return dropped(a.d, reason)
	}
	return n.sendAsked(frame, p, a.d, now)
}

// sendAsked sends what was asked about; a Pod of this node that is not known
// is no reason to try others.
func (n *Node) sendAsked(frame []byte, p packet, d Decision, now time.Duration) Decision {
	if d = n.send(frame, p, d, now); d.Verdict == Deny {
		return dropped(d, tunnelPod)
	}
	return d
}
