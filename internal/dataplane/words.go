// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"net/netip"
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
