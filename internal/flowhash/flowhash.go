// SPDX-License-Identifier: Apache-2.0

// Package flowhash is the keyed hash of a flow, equal bit for bit to the one
// in the BPF programs, and what else follows from the shard's secret.
package flowhash

import (
	"encoding/binary"
	"math/bits"
	"net/netip"
)

// Key is the key of the flow hash: two little-endian words.
type Key [16]byte

// Words returns the key as the BPF programs take it.
func (k Key) Words() [2]uint64 {
	return [2]uint64{
		binary.LittleEndian.Uint64(k[:8]),
		binary.LittleEndian.Uint64(k[8:]),
	}
}

// Hash returns the hash of a flow. Its top bits are the slot. Both addresses
// are of one family; a v4-mapped address counts as IPv4.
//
// The words that are hashed are the packet's bytes as they lie in memory, read
// little-endian; the last one ends in the family, so that no IPv4 flow has the
// words of an IPv6 one and no block with the length is needed.
func (k Key) Hash(client, vip netip.Addr, clientPort, vipPort uint16, proto uint8) uint64 {
	client, vip = client.Unmap(), vip.Unmap()
	last := uint64(bits.ReverseBytes16(clientPort)) |
		uint64(bits.ReverseBytes16(vipPort))<<16 |
		uint64(proto)<<32

	s := newSip(k.Words())
	if client.Is4() {
		c, v := client.As4(), vip.As4()
		s.word(uint64(binary.LittleEndian.Uint32(c[:])) |
			uint64(binary.LittleEndian.Uint32(v[:]))<<32)
		s.word(last | 4<<56)
	} else {
		c, v := client.As16(), vip.As16()
		s.word(binary.LittleEndian.Uint64(c[:8]))
		s.word(binary.LittleEndian.Uint64(c[8:]))
		s.word(binary.LittleEndian.Uint64(v[:8]))
		s.word(binary.LittleEndian.Uint64(v[8:]))
		s.word(last | 6<<56)
	}
	return s.sum()
}

// sip is the state of SipHash-1-3 (Aumasson and Bernstein, 2012).
type sip struct{ v0, v1, v2, v3 uint64 }

func newSip(key [2]uint64) sip {
	return sip{
		v0: key[0] ^ 0x736f6d6570736575,
		v1: key[1] ^ 0x646f72616e646f6d,
		v2: key[0] ^ 0x6c7967656e657261,
		v3: key[1] ^ 0x7465646279746573,
	}
}

func (s *sip) word(m uint64) {
	s.v3 ^= m
	s.round()
	s.v0 ^= m
}

func (s *sip) round() {
	s.v0 += s.v1
	s.v1 = bits.RotateLeft64(s.v1, 13) ^ s.v0
	s.v0 = bits.RotateLeft64(s.v0, 32)
	s.v2 += s.v3
	s.v3 = bits.RotateLeft64(s.v3, 16) ^ s.v2
	s.v0 += s.v3
	s.v3 = bits.RotateLeft64(s.v3, 21) ^ s.v0
	s.v2 += s.v1
	s.v1 = bits.RotateLeft64(s.v1, 17) ^ s.v2
	s.v2 = bits.RotateLeft64(s.v2, 32)
}

func (s *sip) sum() uint64 {
	s.v2 ^= 0xff
	s.round()
	s.round()
	s.round()
	return s.v0 ^ s.v1 ^ s.v2 ^ s.v3
}
