// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
)

// Bounds on what is read of a capture.
const (
	pcapFrames = 10_000
	pcapFrame  = 64 << 10
)

// readPcap reads the frames of a classic pcap file of Ethernet.
func readPcap(r io.Reader) ([][]byte, error) {
	var head [24]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("read the capture: %w", err)
	}
	var order binary.ByteOrder
	switch binary.LittleEndian.Uint32(head[:]) {
	case 0xa1b2c3d4, 0xa1b23c4d:
		order = binary.LittleEndian
	case 0xd4c3b2a1, 0x4d3cb2a1:
		order = binary.BigEndian
	default:
		return nil, errors.New("read the capture: not classic pcap; convert it with: editcap -F pcap IN OUT")
	}
	if link := order.Uint32(head[20:]); link != 1 {
		return nil, fmt.Errorf("read the capture: link type %d, not Ethernet", link)
	}
	var frames [][]byte
	for len(frames) < pcapFrames {
		var record [16]byte
		if _, err := io.ReadFull(r, record[:]); errors.Is(err, io.EOF) {
			return frames, nil
		} else if err != nil {
			return nil, fmt.Errorf("read packet %d of the capture: %w", len(frames)+1, err)
		}
		length := order.Uint32(record[8:])
		if length > pcapFrame {
			return nil, fmt.Errorf("read packet %d of the capture: %d bytes", len(frames)+1, length)
		}
		frame := make([]byte, length)
		if _, err := io.ReadFull(r, frame); err != nil {
			return nil, fmt.Errorf("read packet %d of the capture: %w", len(frames)+1, err)
		}
		frames = append(frames, frame)
	}
	return frames, nil
}

func tcpFrame(from, to netip.AddrPort, flags byte) []byte {
	tcp := make([]byte, 20)
	tcp[12], tcp[13] = 5<<4, flags
	return ipFrame(from, to, 6, tcp)
}

func udpFrame(from, to netip.AddrPort) []byte {
	udp := make([]byte, 8)
	binary.BigEndian.PutUint16(udp[4:], uint16(len(udp)))
	return ipFrame(from, to, 17, udp)
}

// ipFrame puts Ethernet and IP headers before a transport header. Checksums
// are left out: nothing on the way looks at them.
func ipFrame(from, to netip.AddrPort, proto byte, l4 []byte) []byte {
	binary.BigEndian.PutUint16(l4, from.Port())
	binary.BigEndian.PutUint16(l4[2:], to.Port())
	frame := make([]byte, 14)
	if from.Addr().Is4() {
		binary.BigEndian.PutUint16(frame[12:], 0x0800)
		ip := make([]byte, 20)
		ip[0], ip[8], ip[9] = 0x45, 64, proto
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)))
		copy(ip[12:], from.Addr().AsSlice())
		copy(ip[16:], to.Addr().AsSlice())
		return append(append(frame, ip...), l4...)
	}
	binary.BigEndian.PutUint16(frame[12:], 0x86dd)
	ip := make([]byte, 40)
	ip[0], ip[6], ip[7] = 0x60, proto, 64
	binary.BigEndian.PutUint16(ip[4:], uint16(len(l4)))
	copy(ip[8:], from.Addr().AsSlice())
	copy(ip[24:], to.Addr().AsSlice())
	return append(append(frame, ip...), l4...)
}
