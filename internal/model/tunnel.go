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
	if p.dst.Addr() != own || p.proto != UDP && p.proto != ipv4 && p.proto != ipv6 {
		return p, false
	}
	p, reason := p.parseTransport(frame, false)
	return p, reason == "" && !p.unusual() && (p.proto != UDP || p.dst.Port() == n.GenevePort)
}

// unwrap decides about a tunnel packet to this node.
func (n *Node) unwrap(frame []byte, outer packet, now time.Duration) Decision {
	if !n.knows(outer.src.Addr()) {
		return dropped(Decision{}, tunnelSource)
	}
	var target netip.AddrPort
	var d Decision
	at, kind := outer.l4, uint16(etherIPv4)
	switch outer.proto {
	case UDP:
		var reason Reason
		if target, d.Hash, at, kind, reason = n.readOption(frame, outer.l4); reason != "" {
			return dropped(Decision{}, reason)
		}
	case ipv6:
		kind = etherIPv6
	}
	inner, reason := parseFixed(frame, at, kind)
	if reason == "" {
		inner, reason = inner.parseTransport(frame, false)
	}
	if reason == notIP {
		reason = malformed
	}
	if reason == "" {
		inner, reason = n.examine(frame, inner, now)
	}
	if reason != "" {
		return dropped(Decision{}, reason)
	}
	if outer.proto != UDP {
		target = inner.dst
	}
	if outer.tos&3 == 3 && inner.tos&3 == 0 {
		return dropped(Decision{}, tunnelECN)
	}
	return n.deliver(frame, inner, Target{target, inner.proto}, d, now)
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

// readOption reads Geneve and its one option, behind UDP at an offset: who is
// meant, the flow's hash, and where what kind of packet follows.
func (n *Node) readOption(frame []byte, udp int) (target netip.AddrPort, hash uint64, inner int, kind uint16, reason Reason) {
	at := udp + 8
	option := at + 12
	if option+optionBytes+4 > len(frame) {
		reason = tunnelFormat
		return
	}
	g, o := frame[at:], frame[option:]
	kind = binary.BigEndian.Uint16(g[2:])
	addressLen := int(o[3])
	if g[1] != 0x40 || binary.BigEndian.Uint16(g[8:]) != optionClass || g[10] != optionType || o[0] != optionVersion ||
		addressLen != 4 && addressLen != 16 || int(g[11])*4 != optionBytes+addressLen ||
		int(g[0])*4 != 4+optionBytes+addressLen || kind != etherIPv4 && kind != etherIPv6 {
		reason = tunnelFormat
		return
	}
	switch verb := o[1]; {
	case binary.BigEndian.Uint32(g[4:]) != n.VNI<<8:
		reason = tunnelVNI
	case [8]byte(o[16:]) != n.Tag:
		reason = tunnelTag
	case verb == verbAsk:
		reason = tunnelQuestion
	case verb == verbDenied:
		reason = tunnelBounce
	case verb != verbDeliver, option+optionBytes+addressLen > len(frame):
		reason = tunnelFormat
	}
	if reason != "" {
		return
	}
	address, _ := netip.AddrFromSlice(o[optionBytes : optionBytes+addressLen])
	target = netip.AddrPortFrom(address.Unmap(), binary.BigEndian.Uint16(o[4:]))
	hash, inner = binary.BigEndian.Uint64(o[24:]), option+optionBytes+addressLen
	if inner > offsetMax {
		reason = tunnelFormat
	}
	return
}
