// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"net/netip"
	"slices"
)

const (
	protoICMP   = 1
	protoTCP    = 6
	protoUDP    = 17
	protoICMPv6 = 58

	etherIPv4 = 0x0800
	etherIPv6 = 0x86dd
	etherVLAN = 0x8100
	etherQinQ = 0x88a8

	tcpFIN = 1
	tcpRST = 4
	tcpSYN = 0x02
	tcpACK = 0x10
)

var (
	routerMAC = [6]byte{2, 0, 0, 0, 0, 1}
	ownMAC    = [6]byte{2, 0, 0, 0, 0, 2}
	workerMAC = [6]byte{2, 0, 0, 0, 0, 3}
)

// ipPacket is an IPv4 or IPv6 packet, written out by bytes.
type ipPacket struct {
	src, dst netip.Addr
	proto    byte // of payload, or of its first extension header
	tos, ttl byte
	id, frag uint16 // IPv4: identification, flags and offset
	label    uint32 // IPv6
	options  []byte // IPv4
	payload  []byte
}

func (p ipPacket) bytes() []byte {
	if p.src.Is4() {
		b := make([]byte, 20, 20+len(p.options)+len(p.payload))
		b[0], b[1], b[8], b[9] = byte(0x45+len(p.options)/4), p.tos, p.ttl, p.proto
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(p.options)+len(p.payload)))
		binary.BigEndian.PutUint16(b[4:], p.id)
		binary.BigEndian.PutUint16(b[6:], p.frag)
		copy(b[12:], p.src.AsSlice())
		copy(b[16:], p.dst.AsSlice())
		b = append(b, p.options...)
		binary.BigEndian.PutUint16(b[10:], internetSum(b))
		return append(b, p.payload...)
	}
	b := make([]byte, 40, 40+len(p.payload))
	binary.BigEndian.PutUint32(b, 6<<28|uint32(p.tos)<<20|p.label)
	binary.BigEndian.PutUint16(b[4:], uint16(len(p.payload)))
	b[6], b[7] = p.proto, p.ttl
	copy(b[8:], p.src.AsSlice())
	copy(b[24:], p.dst.AsSlice())
	return append(b, p.payload...)
}

// internetSum is the Internet checksum of the pieces, each of even length but for
// the last.
func internetSum(pieces ...[]byte) uint16 {
	var sum uint32
	for _, piece := range pieces {
		for i, b := range piece {
			if i%2 == 0 {
				sum += uint32(b) << 8
			} else {
				sum += uint32(b)
			}
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

func transportSum(src, dst netip.Addr, proto byte, segment []byte) uint16 {
	pseudo := binary.BigEndian.AppendUint32(nil, uint32(len(segment)))
	return internetSum(src.AsSlice(), dst.AsSlice(), append(pseudo, 0, proto), segment)
}

func tcpSegment(src, dst netip.AddrPort, flags byte, data []byte) []byte {
	b := make([]byte, 20, 20+len(data))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	b[7], b[11], b[12], b[13], b[14] = 1, 1, 5<<4, flags, 0xff
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[16:], transportSum(src.Addr(), dst.Addr(), protoTCP, b))
	return b
}

func udpDatagram(src, dst netip.AddrPort, data []byte) []byte {
	b := make([]byte, 8, 8+len(data))
	binary.BigEndian.PutUint16(b, src.Port())
	binary.BigEndian.PutUint16(b[2:], dst.Port())
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(data)))
	b = append(b, data...)
	binary.BigEndian.PutUint16(b[6:], transportSum(src.Addr(), dst.Addr(), protoUDP, b))
	return b
}

// icmpMessage is of ICMP or ICMPv6, by the family of src; number is what
// follows the checksum.
func icmpMessage(src, dst netip.Addr, kind, code byte, number uint32, data []byte) []byte {
	b := append(binary.BigEndian.AppendUint32([]byte{kind, code, 0, 0}, number), data...)
	sum := internetSum(b)
	if src.Is6() {
		sum = transportSum(src, dst, protoICMPv6, b)
	}
	binary.BigEndian.PutUint16(b[2:], sum)
	return b
}

// ether frames an IP packet, with VLAN tags outermost first.
func ether(dst, src [6]byte, packet []byte, tags ...uint16) []byte {
	b := append(slices.Clone(dst[:]), src[:]...)
	for i, tag := range tags {
		kind := uint16(etherVLAN)
		if i < len(tags)-1 {
			kind = etherQinQ
		}
		b = binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, kind), tag)
	}
	kind := uint16(etherIPv4)
	if packet[0]>>4 == 6 {
		kind = etherIPv6
	}
	return append(binary.BigEndian.AppendUint16(b, kind), packet...)
}

// fromRouter frames a packet as it arrives.
func fromRouter(p ipPacket, tags ...uint16) []byte {
	return ether(ownMAC, routerMAC, p.bytes(), tags...)
}
