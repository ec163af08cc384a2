// SPDX-License-Identifier: Apache-2.0

package model

import (
	"net/netip"
	"time"
)

// balance decides about a packet to a VIP at the LB node.
func (n *Node) balance(frame []byte, p packet, now time.Duration) Decision {
	p, reason := p.parseTransport(frame, false)
	if reason == "" && p.l3+p.length > len(frame) {
		reason = malformed
	}
	switch {
	case reason != "":
	case p.echo:
		if p.first || !p.mayReply() {
			return dropped(Decision{}, wrongProtocol)
		}
		return Decision{Verdict: Reply}
	case p.icmpError:
		p, reason = p.quotedFlow(frame)
	case p.later:
		p, reason = n.recall(p, now)
	}
	if reason == "" && p.proto != TCP && p.proto != UDP {
		reason = wrongProtocol
	}
	if reason != "" {
		return dropped(Decision{}, reason)
	}
	if p.first && !p.icmpError {
		n.remember(p, now)
	}
	return n.choose(frame, p, now)
}

// choose finds the service and the slot. In a settled slot the hash alone says
// who takes the packet; a backend that is gone is stood in for by the next
// slot's that is not.
func (n *Node) choose(frame []byte, p packet, now time.Duration) Decision {
	service, ok := n.Services[Front{p.dst, p.proto}]
	if !ok {
		if p.icmpError {
			return dropped(Decision{}, icmpUnrelated)
		}
		return dropped(Decision{}, noService)
	}
	a, reason := n.locate(service, p, n.slotHash(service, p))
	if reason == "" && !service.mayCome(p.src.Addr()) {
		reason = sourceRange
	}
	if reason != "" {
		return dropped(a.d, reason)
	}
	if len(a.candidates) > 0 {
		if reason := n.askFirst(frame, p, &a, now); reason != "" {
			return dropped(a.d, reason)
		}
		return n.sendAsked(frame, p, a.d, now)
	}
	if reason := n.order(&a, 0); reason != "" {
		return dropped(a.d, reason)
	}
	a.d.Verb, a.d.Attempt = verbDeliver, attemptOrder
	if p.icmpError || p.proto == TCP && !p.syn {
		a.d.Verb, a.d.Attempt = verbAsk, attemptSlot
	}
	d := n.send(frame, p, a.d, now)
	if d.Verdict == Deny {
		// The backend is on this node, and has no such flow.
		return n.denied(frame, p, a, a.d.Backend, a.d.Attempt, now)
	}
	return d
}

func (n *Node) hash(p packet) uint64 {
	return n.Key.Hash(p.src.Addr(), p.dst.Addr(), p.src.Port(), p.dst.Port(), p.proto)
}

// slotHash is what chooses the slot.
func (n *Node) slotHash(s Service, p packet) uint64 {
	if s.Affinity {
		p.src = netip.AddrPortFrom(p.src.Addr(), 0)
	}
	return n.hash(p)
}

func (s Service) mayCome(client netip.Addr) bool {
	for _, p := range s.Ranges {
		if p.Contains(client) {
			return true
		}
	}
	return s.Ranges == nil
}

// send decides whether the packet can go to the backend that was chosen.
func (n *Node) send(frame []byte, p packet, d Decision, now time.Duration) Decision {
	b := n.Backends[d.Backend]
	if b.Mode == Local {
		return n.deliver(frame, p, Target{b.Target, p.proto}, d, now)
	}
	length := p.length + b.Outer
	expired := p.ttl <= 1 && !p.bounced
	switch {
	case expired && p.mayReply(), !expired && b.MTU > 0 && length > b.MTU && p.mayReply():
		d.Verdict = Reply
	case expired:
		return dropped(d, ttl)
	case b.MTU == 0:
		return dropped(d, noNextHop)
	case length > b.MTU:
		return dropped(d, tooBig)
	default:
		d.Verdict = Forward
	}
	return d
}

type fragmentKey struct {
	src, dst netip.Addr
	id       uint32
	proto    uint8
}

type fragmentPorts struct {
	src, dst uint16
	seen     time.Duration
}

func (p packet) fragmentKey() fragmentKey {
	return fragmentKey{p.src.Addr(), p.dst.Addr(), p.id, p.proto}
}

// remember keeps the ports of a first fragment for the later ones.
func (n *Node) remember(p packet, now time.Duration) {
	if n.fragments == nil {
		n.fragments = map[fragmentKey]fragmentPorts{}
	}
	n.fragments[p.fragmentKey()] = fragmentPorts{p.src.Port(), p.dst.Port(), now}
}

// recall fills in the ports of a later fragment.
func (n *Node) recall(p packet, now time.Duration) (packet, Reason) {
	ports, ok := n.fragments[p.fragmentKey()]
	if !ok || now-ports.seen > fragmentAge {
		return p, fragmentUnknown
	}
	p.src = netip.AddrPortFrom(p.src.Addr(), ports.src)
	p.dst = netip.AddrPortFrom(p.dst.Addr(), ports.dst)
	return p, ""
}
