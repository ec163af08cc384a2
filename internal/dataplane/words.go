// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"crypto/sha256"
	"encoding/binary"
	"net/netip"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
)

// bpfAddrOf is an address as the programs have it: 16 bytes in network order,
// IPv4 as v4-mapped, read as words in the machine's order.
func bpfAddrOf(addr netip.Addr) bpfAddr {
	b := addr.As16()
	var a bpfAddr
	for i := range a.W {
		a.W[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return a
}

// addrOf is its inverse; IPv4 comes back as IPv4.
func addrOf(a bpfAddr) netip.Addr {
	var b [16]byte
	for i, w := range a.W {
		binary.NativeEndian.PutUint32(b[4*i:], w)
	}
	return netip.AddrFrom16(b).Unmap()
}

// swap16 turns a port into network order and back.
func swap16(v uint16) uint16 { return v<<8 | v>>8 }

// backendKey is what places a backend in lookup tables: its address and port,
// so that every LB node has the same, and a Pod that comes back where it was.
func backendKey(target netip.AddrPort) maglev.Key {
	b := target.Addr().As16()
	sum := sha256.Sum256(binary.BigEndian.AppendUint16(b[:], target.Port()))
	return maglev.Key(sum[:16])
}

func serviceKey(id lb.FrontendID) bpfServiceKey {
	return bpfServiceKey{Vip: bpfAddrOf(id.VIP), Port: swap16(id.Port), Proto: uint8(id.Protocol)}
}

// vipKey says that an address is a VIP, whatever the port and protocol.
func vipKey(vip netip.Addr) bpfServiceKey { return bpfServiceKey{Vip: bpfAddrOf(vip)} }

// The layout of the words, and what else Go has to know of bpf/fairlead.h that
// the compiled programs do not tell. A test compares each with its C twin.
const (
	layoutVersion     = 1
	serviceBitsShift  = 32
	serviceFlagsShift = 40
	candidatesShift   = 32
	generationShift   = 32
	generationMask    = 0xffffff
	stateShift        = 56
	vipBitsLog2       = 18
	vipBitsWords      = 1 << (vipBitsLog2 - 6)
	vipBitsMix0       = uint64(0x9e3779b97f4a7c15)
	vipBitsMix1       = uint64(0xc2b2ae3d27d4eb4f)
	podServesMax      = 8
	// serviceNone is the number of a VIP itself.
	serviceNone = 0
)

func serviceWord(offset, bits uint32, f lb.Frontend) uint64 {
	word := uint64(offset) | uint64(bits)<<serviceBitsShift
	if f.Independent {
		word |= uint64(bpfServiceFlagSERVICE_INDEPENDENT) << serviceFlagsShift
	}
	if f.Mode.Held() {
		word |= uint64(bpfServiceFlagSERVICE_ORDERS) << serviceFlagsShift
	}
	if f.Mode == lb.ModeNAT {
		word |= uint64(bpfServiceFlagSERVICE_NAT) << serviceFlagsShift
	}
	if len(f.SourceRanges) > 0 {
		word |= uint64(bpfServiceFlagSERVICE_RANGES) << serviceFlagsShift
	}
	if f.Limits != (lb.Limits{}) {
		word |= uint64(bpfServiceFlagSERVICE_LIMITS) << serviceFlagsShift
	}
	if f.Affinity > 0 {
		word |= uint64(bpfServiceFlagSERVICE_AFFINITY) << serviceFlagsShift
	}
	return word
}

func slotWord(owner, candidates uint32) uint64 {
	return uint64(owner) | uint64(candidates)<<candidatesShift
}

func backendWord(state bpfBackendState, generation, nextHop uint32) uint64 {
	return uint64(state)<<stateShift | uint64(generation&generationMask)<<generationShift | uint64(nextHop)
}

func wordState(word uint64) bpfBackendState { return bpfBackendState(word >> stateShift) }

// vipBit is where vip_bits says that an address may be a VIP.
func vipBit(vip netip.Addr) (word uint32, mask uint64) {
	a := vip.As16()
	low, high := binary.NativeEndian.Uint64(a[:8]), binary.NativeEndian.Uint64(a[8:])
	bit := ((low*vipBitsMix0 + high) * vipBitsMix1) >> (64 - vipBitsLog2)
	return uint32(bit >> 6), 1 << (bit & 63)
}

var modes = map[lb.Mode]bpfMode{
	lb.ModeGeneve: bpfModeMODE_GENEVE, lb.ModeIPIP: bpfModeMODE_IPIP, lb.ModeLocal: bpfModeMODE_LOCAL, lb.ModeL2: bpfModeMODE_L2, lb.ModeNAT: bpfModeMODE_NAT,
}

// targetOf is where a backend's packets are delivered.
func targetOf(id lb.BackendID) netip.AddrPort {
	if id.Mode == lb.ModeLocal {
		return id.Local
	}
	return id.Target
}

// backendRow is what of a backend does not change while its number lives.
func backendRow(b lb.Backend, tag [8]byte) bpfBackend {
	target := targetOf(b.ID)
	row := bpfBackend{Address: bpfAddrOf(target.Addr()), Port: swap16(target.Port()),
		Mode: uint8(modes[b.ID.Mode]), Tag: binary.NativeEndian.Uint64(tag[:])}
	if b.ID.Tunnel.IsValid() {
		row.Tunnel = bpfAddrOf(b.ID.Tunnel)
	}
	if b.ID.Tunnel.Is4() && (b.ID.Mode == lb.ModeGeneve || b.ID.Mode == lb.ModeIPIP) {
		row.OuterSum = outerSum(b.ID)
	}
	return row
}

// outerSum adds what is fixed of the outer IPv4 header, as 16-bit words in
// memory: version and length, DF, TTL 64 and protocol, destination.
func outerSum(id lb.BackendID) uint32 {
	proto := byte(lb.UDP)
	if id.Mode == lb.ModeIPIP {
		proto = 4 // IPv4-in-IPv4; the mode has no IPv6-in-IPv4
	}
	dst := id.Tunnel.As4()
	fixed := []byte{0x45, 0, 0x40, 0, 64, proto, dst[0], dst[1], dst[2], dst[3]}
	sum := uint32(0)
	for i := 0; i < len(fixed); i += 2 {
		sum += uint32(binary.NativeEndian.Uint16(fixed[i:]))
	}
	return sum
}
