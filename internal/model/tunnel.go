// SPDX-License-Identifier: Apache-2.0

package model

import (
	"encoding/binary"
	"net/netip"
	"time"
)

// The option, as in bpf/fairlead.h.
const (
	optionClass   = 0xff4c
	optionType    = 0x81
	optionVersion = 1
	optionBytes   = 32 // without the target's address
	verbDeliver   = 1
	verbAsk       = 2
	verbDenied    = 3
)

// tunnelHere says whether a packet is a tunnel packet to this node.
func (n *Node) tunnelHere(frame []byte, p packet) (packet, bool) {
	own := n.Node6
	if p.v4() {
		own = n.Node4
	}
	if p.dst.Addr() != own || p.proto != UDP && (!n.Backend || p.proto != ipv4 && p.proto != ipv6) {
		return p, false
	}
	p, reason := p.parseTransport(frame, false)
	return p, reason == "" && !p.unusual() && (p.proto != UDP || p.dst.Port() == n.GenevePort)
}

// unwrap decides about a tunnel packet to this node.
func (n *Node) unwrap(frame []byte, outer packet, now time.Duration) Decision {
	known := n.knows(outer.src.Addr())
	o := option{verb: verbDeliver, inner: outer.l4, kind: etherIPv4}
	switch outer.proto {
	case UDP:
		var reason Reason
		if o, reason = n.readOption(frame, outer.l4); reason != "" {
			if !known {
				reason = tunnelSource
			}
			return dropped(Decision{}, reason)
		}
		if n.LB && o.verb == verbDenied {
			return n.bounce(frame, outer, o, now)
		}
	case ipv6:
		o.kind = etherIPv6
	}
	switch {
	case !known || !n.Backend:
		return dropped(Decision{}, tunnelSource)
	case outer.proto == UDP && o.tag != n.Tag:
		return dropped(Decision{}, tunnelTag)
	case o.verb == verbDenied:
		return dropped(Decision{}, tunnelBounce)
	}
	inner, reason := n.innerPacket(frame, o, now)
	if reason != "" {
		return dropped(Decision{}, reason)
	}
	if outer.proto != UDP {
		o.target = inner.dst
	}
	if outer.tos&3 == 3 && inner.tos&3 == 0 {
		return dropped(Decision{}, tunnelECN)
	}
	d := n.deliver(frame, inner, Target{o.target, inner.proto}, Decision{Hash: o.hash, Verb: o.verb}, now)
	if d.Verdict == Deny && outer.proto != UDP {
		d = dropped(d, tunnelPod)
	}
	d.Verb = 0 // of what was sent; this came
	return d
}

func (n *Node) innerPacket(frame []byte, o option, now time.Duration) (packet, Reason) {
	inner, reason := parseFixed(frame, o.inner, o.kind)
	if reason == "" {
		inner, reason = inner.parseTransport(frame, false)
	}
	if reason == "" {
		inner, reason = n.examine(frame, inner, now)
	}
	if reason == notIP {
		reason = malformed
	}
	return inner, reason
}

// bounce decides about a packet that a backend's node sent back.
func (n *Node) bounce(frame []byte, outer packet, o option, now time.Duration) Decision {
	b, ok := n.Backends[o.backend]
	if !ok || b.Mode != Geneve || b.Tunnel != outer.src.Addr() || b.Tag != o.tag || b.Generation != o.generation {
		return dropped(Decision{}, tunnelBounce)
	}
	inner, reason := n.innerPacket(frame, o, now)
	if reason != "" {
		return dropped(Decision{}, reason)
	}
	service, ok := n.Services[Front{inner.dst, inner.proto}]
	if !ok || n.slotHash(service, inner) != o.hash {
		return dropped(Decision{}, tunnelBounce)
	}
	a, reason := n.locate(service, inner, o.hash)
	if reason != "" || !n.mayDeny(&a, o.backend) {
		return dropped(a.d, tunnelBounce)
	}
	inner.bounced = true
	return n.denied(frame, inner, a, o.backend, o.attempt, now)
}

// mayDeny says whether a backend is one that the flow can have been sent to.
func (n *Node) mayDeny(a *ask, denier uint32) bool {
	for attempt := range attemptsMax {
		if number := n.attempted(a, attempt); number != 0 && number == denier {
			return true
		}
	}
	if n.hinted(n.hints, a.flow) == denier {
		return true
	}
	for i := range uint32(standInsMax + 1) {
		if a.service.Slots[(a.own+i)%uint32(len(a.service.Slots))] == denier {
			return true
		}
	}
	return false
}

// examine finds the flow of what was in a tunnel.
func (n *Node) examine(frame []byte, inner packet, now time.Duration) (packet, Reason) {
	switch {
	case inner.l3+inner.length > len(frame):
		return inner, malformed
	case inner.icmpError:
		return inner.quotedFlow(frame)
	case inner.proto != TCP && inner.proto != UDP:
		return inner, wrongProtocol
	case inner.later:
		return n.recall(inner, now)
	case inner.first:
		n.remember(inner, now)
	}
	return inner, ""
}

// knows says whether an address is an LB node's.
func (n *Node) knows(a netip.Addr) bool {
	for _, p := range n.LBNodes {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// option is what a tunnel packet says beside the packet in it.
type option struct {
	target              netip.AddrPort
	hash                uint64
	tag                 [8]byte
	backend, generation uint32
	verb, attempt       uint8
	inner               int    // where the packet in it begins
	kind                uint16 // and what it is
}

// readOption reads Geneve and its one option, behind UDP at an offset.
func (n *Node) readOption(frame []byte, udp int) (option, Reason) {
	at := udp + 8
	start := at + 12
	if start+optionBytes+4 > len(frame) {
		return option{}, tunnelFormat
	}
	g, o := frame[at:], frame[start:]
	addressLen := int(o[3])
	read := option{kind: binary.BigEndian.Uint16(g[2:]), verb: o[1], attempt: o[2], tag: [8]byte(o[16:]),
		backend: binary.BigEndian.Uint32(o[8:]), generation: binary.BigEndian.Uint32(o[12:]), hash: binary.BigEndian.Uint64(o[24:]),
		inner: start + optionBytes + addressLen}
	if g[1] != 0x40 || binary.BigEndian.Uint16(g[8:]) != optionClass || g[10] != optionType || o[0] != optionVersion ||
		addressLen != 4 && addressLen != 16 || int(g[11])*4 != optionBytes+addressLen ||
		int(g[0])*4 != 4+optionBytes+addressLen || read.kind != etherIPv4 && read.kind != etherIPv6 ||
		read.verb < verbDeliver || read.verb > verbDenied {
		return read, tunnelFormat
	}
	if binary.BigEndian.Uint32(g[4:]) != n.VNI<<8 {
		return read, tunnelVNI
	}
	if read.inner > len(frame) || read.inner > offsetMax {
		return read, tunnelFormat
	}
	address, _ := netip.AddrFromSlice(o[optionBytes : optionBytes+addressLen])
	read.target = netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(o[4:]))
	return read, ""
}
