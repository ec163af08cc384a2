// SPDX-License-Identifier: Apache-2.0

package model

import (
	"encoding/binary"
	"net/netip"
)

// packet is what the headers say. Offsets count from the start of the frame.
type packet struct {
	src, dst netip.AddrPort
	proto    uint8
	tos, ttl uint8
	l3, l4   int
	length   int // of IP header and payload, as the header says
	id       uint32
	ihl      int // of IPv4, in words

	syn, first, later, icmpError, echo, bounced bool
}

func (p packet) v4() bool { return p.src.Addr().Is4() }

// unusual says whether anything but a plain segment or datagram was found.
func (p packet) unusual() bool { return p.first || p.later || p.icmpError || p.echo }

// parseAddresses reads Ethernet, up to two VLAN tags and the fixed part of the
// L3 header.
func parseAddresses(frame []byte) (packet, Reason) {
	at := 12
	for range vlanTagsMax {
		if at+2 > len(frame) {
			return packet{}, notIP
		}
		if kind := binary.BigEndian.Uint16(frame[at:]); kind != etherVLAN && kind != etherQinQ {
			break
		}
		at += 4
	}
	if at+2 > len(frame) {
		return packet{}, notIP
	}
	return parseFixed(frame, at+2, binary.BigEndian.Uint16(frame[at:]))
}

func parseFixed(frame []byte, l3 int, kind uint16) (packet, Reason) {
	if l3 > len(frame) {
		return packet{}, notIP
	}
	h := frame[l3:]
	switch {
	case kind == etherIPv4 && len(h) >= 20 && h[0]>>4 == 4:
		ihl := int(h[0] & 15)
		return packet{
			src: netip.AddrPortFrom(netip.AddrFrom4([4]byte(h[12:])), 0), dst: netip.AddrPortFrom(netip.AddrFrom4([4]byte(h[16:])), 0),
			proto: h[9], tos: h[1], ttl: h[8], l3: l3, l4: l3 + 4*ihl, ihl: ihl,
			length: int(binary.BigEndian.Uint16(h[2:])),
		}, ""
	case kind == etherIPv6 && len(h) >= 40 && h[0]>>4 == 6:
		return packet{
			src: netip.AddrPortFrom(address6(h[8:]), 0), dst: netip.AddrPortFrom(address6(h[24:]), 0),
			proto: h[6], tos: h[0]<<4 | h[1]>>4, ttl: h[7], l3: l3, l4: l3 + 40,
			length: 40 + int(binary.BigEndian.Uint16(h[4:])),
		}, ""
	}
	return packet{}, notIP
}

func address6(b []byte) netip.Addr { return netip.AddrFrom16([16]byte(b)) }

// parseTransport reads what follows the addresses. Of a packet quoted in an
// ICMP error only 8 bytes of the transport need be there.
func (p packet) parseTransport(frame []byte, quoted bool) (packet, Reason) {
	if p.v4() {
		if p.ihl < 5 {
			return p, malformed
		}
		id, cut := binary.BigEndian.Uint16(frame[p.l3+4:]), binary.BigEndian.Uint16(frame[p.l3+6:])
		if cut&0x3fff != 0 {
			p.id = uint32(id)
			p.later = cut&0x1fff != 0
			p.first = !p.later
		}
	} else {
		var reason Reason
		if p, reason = p.parseExtensions(frame); reason != "" {
			return p, reason
		}
	}
	if p.later {
		if p.l4-p.l3 > p.length {
			return p, malformed
		}
		return p, ""
	}
	need := 8
	switch p.proto {
	case TCP:
		if !quoted {
			need = 20
		}
	case UDP, icmp4, icmp6:
	default:
		return p, ""
	}
	if p.l4 > offsetMax || p.l4-p.l3+need > p.length || p.l4+need > len(frame) {
		return p, malformed
	}
	return p.parsePorts(frame[p.l4:], quoted), ""
}

func (p packet) parsePorts(l4 []byte, quoted bool) packet {
	switch p.proto {
	case icmp4:
		p.echo = p.v4() && l4[0] == 8
		p.icmpError = p.v4() && (l4[0] == 3 || l4[0] == 11 || l4[0] == 12)
	case icmp6:
		p.echo = !p.v4() && l4[0] == 128
		p.icmpError = !p.v4() && l4[0] >= 1 && l4[0] <= 4
	default:
		p.src = netip.AddrPortFrom(p.src.Addr(), binary.BigEndian.Uint16(l4))
		p.dst = netip.AddrPortFrom(p.dst.Addr(), binary.BigEndian.Uint16(l4[2:]))
		p.syn = p.proto == TCP && !quoted && l4[13]&(flagSYN|flagACK) == flagSYN
	}
	return p
}

// parseExtensions walks IPv6 extension headers, six at most.
func (p packet) parseExtensions(frame []byte) (packet, Reason) {
	for i := 0; ; i++ {
		switch p.proto {
		case hopopts, routing, dstopts, fragment:
		default:
			return p, ""
		}
		if i == extensionsMax || p.l4 > offsetMax {
			return p, extensionHeaders
		}
		if p.l4+8 > len(frame) {
			return p, malformed
		}
		ext := frame[p.l4:]
		bytes := 8
		switch {
		case p.proto == routing && ext[3] != 0:
			return p, extensionHeaders // not for this address yet
		case p.proto == fragment:
			cut := binary.BigEndian.Uint16(ext[2:])
			p.id = binary.LittleEndian.Uint32(ext[4:])
			p.later = p.later || cut>>3 != 0
			p.first = p.first || cut>>3 == 0 && cut&1 != 0
		default:
			bytes += 8 * int(ext[1])
		}
		p.proto, p.l4 = ext[0], p.l4+bytes
		if p.later {
			return p, ""
		}
	}
}

// quotedFlow puts the flow that an ICMP error is about in place of the error's
// own addresses: the quoted packet was sent by the VIP to the client.
func (p packet) quotedFlow(frame []byte) (packet, Reason) {
	if p.l4+8 > offsetMax {
		return p, malformed
	}
	if p.first {
		return p, icmpUnrelated
	}
	kind := uint16(etherIPv6)
	if p.v4() {
		kind = etherIPv4
	}
	quoted, reason := parseFixed(frame, p.l4+8, kind)
	if reason == "" {
		quoted, reason = quoted.parseTransport(frame, true)
	}
	if reason != "" {
		return p, malformed
	}
	if quoted.src.Addr() != p.dst.Addr() || quoted.later || quoted.proto != TCP && quoted.proto != UDP {
		return p, icmpUnrelated
	}
	p.src, p.dst, p.proto = quoted.dst, quoted.src, quoted.proto
	return p, ""
}

// mayReply says whether an error may be sent to the source (RFC 1122, 4443).
func (p packet) mayReply() bool {
	if p.icmpError || p.later {
		return false
	}
	src := p.src.Addr()
	if !src.Is4() {
		return !src.IsMulticast() && !src.IsUnspecified()
	}
	first := src.As4()[0]
	return first != 0 && first != 127 && first < 224
}

// TCP flags.
const (
	flagFIN = 0x01
	flagSYN = 0x02
	flagRST = 0x04
	flagACK = 0x10
)

// Segment is what a TCP segment says; End counts its data, SYN and FIN.
type Segment struct {
	Seq, End, Ack uint32
	Window        uint16
	Flags         uint8
	Scale         uint8 // of a SYN-ACK's window option
}

// segment reads a client's TCP header.
func (p packet) segment(frame []byte) (Segment, bool) {
	if p.l4 > offsetMax || p.l4+20 > len(frame) {
		return Segment{}, false
	}
	h := frame[p.l4:]
	header := p.l4 - p.l3 + int(h[12]>>4)*4
	if h[12]>>4 < 5 || header > p.length {
		return Segment{}, false
	}
	s := Segment{Seq: binary.BigEndian.Uint32(h[4:]), Ack: binary.BigEndian.Uint32(h[8:]),
		Window: binary.BigEndian.Uint16(h[14:]), Flags: h[13]}
	s.End = s.Seq + uint32(p.length-header)
	if s.Flags&flagSYN != 0 {
		s.End++
	}
	if s.Flags&flagFIN != 0 {
		s.End++
	}
	return s, true
}
