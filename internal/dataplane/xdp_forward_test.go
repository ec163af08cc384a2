// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// path is one combination of families and mode.
type path struct {
	name        string
	mode        bpfMode
	client, vip netip.Addr
	pod, tunnel netip.Addr
	node        netip.Addr // outer source
}

var paths = []path{
	{"ipip/4in4", bpfModeMODE_IPIP, client4, vip4, worker4, worker4, node4},
	{"ipip/6in6", bpfModeMODE_IPIP, client6, vip6, worker6, worker6, node6},
	{"ipip/4in6", bpfModeMODE_IPIP, client4, vip4, worker6, worker6, node6},
	{"geneve/4in4", bpfModeMODE_GENEVE, client4, vip4, pod4, worker4, node4},
	{"geneve/6in6", bpfModeMODE_GENEVE, client6, vip6, pod6, worker6, node6},
	{"geneve/4in6", bpfModeMODE_GENEVE, client4, vip4, pod4, worker6, node6},
	{"geneve/6in4", bpfModeMODE_GENEVE, client6, vip6, pod6, worker4, node4},
}

// packet is one of the client's to the VIP: "tcp", "syn" or "udp".
func (p path) packet(kind string, data []byte) ipPacket {
	src, dst := netip.AddrPortFrom(p.client, 40000), netip.AddrPortFrom(p.vip, 80)
	packet := ipPacket{src: p.client, dst: p.vip, proto: protoTCP, tos: 0xb9, ttl: 60, id: 0x1234, frag: 0x4000, label: 0x54321}
	switch kind {
	case "tcp":
		packet.payload = tcpSegment(src, dst, tcpACK, data)
	case "syn":
		packet.payload = tcpSegment(src, dst, tcpSYN, data)
	case "udp":
		packet.proto, packet.payload = protoUDP, udpDatagram(src, dst, data)
	}
	return packet
}

func (p path) hash(proto uint8) uint64 {
	return testKey.Hash(p.client, p.vip, 40000, 80, proto)
}

// wrapped is the outer packet that carries inner to backend number.
func (p path) wrapped(inner ipPacket, hash uint64, number uint32) ipPacket {
	family := byte(4)
	if inner.src.Is6() {
		family = 41
	}
	tos := inner.tos
	inner.ttl--
	outer := ipPacket{src: p.node, dst: p.tunnel, tos: tos, ttl: 64, frag: 0x4000, proto: family, payload: inner.bytes()}
	if p.tunnel.Is6() {
		outer.label = uint32(hash & 0xfffff)
	}
	if p.mode == bpfModeMODE_GENEVE {
		outer.proto = protoUDP
		outer.payload = p.geneve(outer.payload, hash, number)
	}
	return outer
}

// geneve is written from RFC 8926 and the option's layout, field by field.
func (p path) geneve(inner []byte, hash uint64, number uint32) []byte {
	kind, address := uint16(etherIPv4), p.pod.AsSlice()
	if inner[0]>>4 == 6 {
		kind = etherIPv6
	}
	length := byte(32 + len(address))
	be := binary.BigEndian
	b := be.AppendUint16(nil, uint16(0xc000|hash&0x3fff))
	b = be.AppendUint16(b, genevePort)
	b = be.AppendUint16(b, uint16(8+8+4+int(length)+len(inner)))
	b = append(b, 0, 0)                // no checksum
	b = append(b, 1+length/4, 0x40)    // options, and that one is critical
	b = be.AppendUint16(b, kind)       // of the payload
	b = be.AppendUint32(b, testVNI<<8) //
	b = be.AppendUint16(b, 0xff4c)     // class
	b = append(b, 0x81, length/4)      // type
	verb, attempt := asked(inner)
	b = append(b, 1, verb, attempt, byte(len(address)))
	b = be.AppendUint16(b, podPort)
	b = append(b, 0, 0)
	b = be.AppendUint32(b, number)
	b = be.AppendUint32(b, testGeneration)
	b = append(b, testTag[:]...)
	b = be.AppendUint64(b, hash)
	b = append(b, address...)
	return append(b, inner...)
}

// asked is the verb and the attempt that a packet of a settled slot has: what
// begins a flow, and datagrams, are orders.
func asked(inner []byte) (verb, attempt byte) {
	proto, transport := inner[9], inner[20:]
	if inner[0]>>4 == 6 {
		proto, transport = inner[6], inner[40:]
	}
	if proto == protoICMP || proto == protoICMPv6 || proto == protoTCP && transport[13]&(tcpSYN|tcpACK) != tcpSYN {
		return byte(bpfVerbVERB_ASK), 1
	}
	return byte(bpfVerbVERB_DELIVER), 0x40
}

// ordered turns a question of the frame that one wraps into an order.
func ordered(frame []byte) []byte {
	frame = slices.Clone(frame)
	at := 14 + 20 + 8 + 12
	if frame[12] == 0x86 {
		at += 20
	}
	frame[at+1], frame[at+2] = byte(bpfVerbVERB_DELIVER), 0x40
	return frame
}

// one is a network with one backend on the path, and its TCP and UDP services.
func (p path) one(t testing.TB, edit func(*bpfConfig), ifindex uint32, mtu, vlan uint16) (*network, uint32) {
	t.Helper()
	n := newNetwork(t, edit)
	number := n.backend(p.mode, netip.AddrPortFrom(p.pod, podPort), p.tunnel, n.hop(ifindex, mtu, vlan))
	n.service(p.vip, 80, protoTCP, number)
	n.service(p.vip, 80, protoUDP, number)
	return n, number
}

func TestForward(t *testing.T) {
	for _, p := range paths {
		for _, kind := range []string{"tcp", "syn", "udp"} {
			t.Run(fmt.Sprintf("%s/%s", p.name, kind), func(t *testing.T) {
				n, number := p.one(t, nil, ingress, 1500, 0)
				in := p.packet(kind, []byte("some bytes"))
				want := ether(workerMAC, ownMAC, p.wrapped(in, p.hash(in.proto), number).bytes())
				n.expect(fromRouter(in), xdpTX, want)
				service, connections := uint32(1), uint64(0)
				if kind == "udp" {
					service = 2
				}
				if kind == "syn" {
					connections = 1
				}
				want2 := bpfCounter{Packets: 1, Bytes: uint64(len(in.bytes())), Connections: connections}
				if got := n.counter(n.ServiceCounters, service); got != want2 {
					t.Errorf("service counter %+v, want %+v", got, want2)
				}
				if got := n.counter(n.BackendCounters, number); got != want2 {
					t.Errorf("backend counter %+v, want %+v", got, want2)
				}
			})
		}
	}
}

// Incoming tags go, the next hop's comes; padding after the packet stays.
func TestForwardVLAN(t *testing.T) {
	for _, p := range paths {
		for _, tags := range [][]uint16{nil, {5}, {5, 6}} {
			for _, out := range []uint16{0, 9} {
				t.Run(fmt.Sprintf("%s/%v/%d", p.name, tags, out), func(t *testing.T) {
					n, number := p.one(t, nil, 77, 1500, out)
					in := p.packet("tcp", nil)
					var push []uint16
					if out != 0 {
						push = []uint16{out}
					}
					padding := []byte{0, 0, 0, 0, 0, 0}
					want := ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), number).bytes(), push...)
					n.expect(append(fromRouter(in, tags...), padding...), xdpRedirect, append(want, padding...))
				})
			}
		}
	}
}

func TestForwardIPv4Options(t *testing.T) {
	p := paths[0]
	n, number := p.one(t, nil, ingress, 1500, 0)
	in := p.packet("tcp", nil)
	in.options = []byte{1, 1, 1, 1, 7, 7, 4, 0, 0, 0, 0, 0}
	n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), number).bytes()))
}

// extend puts IPv6 extension headers of 8 bytes before the transport.
func extend(p ipPacket, kinds ...byte) ipPacket {
	next := p.proto
	for _, kind := range slices.Backward(kinds) {
		p.payload = append([]byte{next, 0, 0, 0, 0, 0, 0, 0}, p.payload...)
		next = kind
	}
	p.proto = next
	return p
}

func TestForwardExtensionHeaders(t *testing.T) {
	p := paths[1]
	n, number := p.one(t, nil, ingress, 1500, 0)
	for _, kinds := range [][]byte{{0}, {0, 60, 43}, {60, 60, 60, 60, 60, 60}, {44}} {
		in := extend(p.packet("tcp", nil), kinds...)
		n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), number).bytes()))
	}
	n.expectDrop(fromRouter(extend(p.packet("tcp", nil), 60, 60, 60, 60, 60, 60, 60)), bpfDropDROP_EXTENSION_HEADERS)
	visits := extend(p.packet("tcp", nil), 43)
	visits.payload[3] = 1
	n.expectDrop(fromRouter(visits), bpfDropDROP_EXTENSION_HEADERS)
}

// The outer source varies with the flow, within the declared prefix.
func TestForwardIPIPSources(t *testing.T) {
	p := paths[0]
	n, number := p.one(t, func(c *bpfConfig) {
		c.Ipip4 = wireAddr(netip.MustParseAddr("10.9.0.0"))
		c.Ipip4Mask = wireAddr(netip.MustParseAddr("0.0.255.255"))
	}, ingress, 1500, 0)
	in := p.packet("tcp", nil)
	hash := p.hash(protoTCP)
	p.node = netip.AddrFrom4([4]byte{10, 9, byte(hash >> 16), byte(hash >> 24)})
	n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, hash, number).bytes()))
}

// A gone backend's packets go to the following slots' first usable one.
func TestForwardStandIn(t *testing.T) {
	p := paths[3]
	n := newNetwork(t, nil)
	row := n.hop(ingress, 1500, 0)
	var numbers []uint32
	for range 4 {
		numbers = append(numbers, n.backend(p.mode, netip.AddrPortFrom(p.pod, podPort), p.tunnel, row))
	}
	n.service(p.vip, 80, protoTCP, numbers...)
	in := p.packet("syn", nil)
	hash := p.hash(protoTCP)
	own := int(hash>>56) % 4
	for i := range 4 {
		at := (own + i) % 4
		n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, hash, numbers[at]).bytes()))
		n.expectEvent(bpfEventEVENT_STAND_IN, uint64(i))
		n.setState(numbers[at], []bpfBackendState{bpfBackendStateBACKEND_GONE, bpfBackendStateBACKEND_UNUSED}[i%2], row)
	}
	n.expectDrop(fromRouter(in), bpfDropDROP_NO_BACKEND)
	n.setState(numbers[own], bpfBackendStateBACKEND_DRAINING, row)
	n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, hash, numbers[own]).bytes()))
}

func TestForwardJumbo(t *testing.T) {
	p := paths[4]
	n, number := p.one(t, nil, ingress, 9100, 0)
	in := p.packet("tcp", make([]byte, 8000))
	n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), number).bytes()))
}

// Later fragments follow the first, and are nothing without it.
func TestForwardFragments(t *testing.T) {
	for _, p := range []path{paths[3], paths[4]} {
		t.Run(p.name, func(t *testing.T) {
			n, number := p.one(t, nil, ingress, 1500, 0)
			whole := p.packet("udp", make([]byte, 64))
			first, later := whole, whole
			first.frag, later.frag = 0x2000, 5
			first.payload, later.payload = whole.payload[:40], whole.payload[40:]
			if p.vip.Is6() {
				first, later = extend(first, 44), extend(later, 44)
				copy(first.payload[2:], []byte{0, 1, 9, 9, 9, 9})
				copy(later.payload[2:], []byte{0, 40, 9, 9, 9, 9})
			}
			n.expectDrop(fromRouter(later), bpfDropDROP_FRAGMENT_UNKNOWN)
			for _, in := range []ipPacket{first, later} {
				n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoUDP), number).bytes()))
			}
		})
	}
}

// What is not for a VIP is not ours.
func TestPass(t *testing.T) {
	n, _ := paths[0].one(t, nil, ingress, 1500, 0)
	stranger := paths[0].packet("tcp", nil)
	stranger.dst = netip.MustParseAddr("192.0.2.77")
	stranger.ttl = 1
	arp := ether(ownMAC, routerMAC, make([]byte, 46))
	binary.BigEndian.PutUint16(arp[12:], 0x0806)
	for _, frame := range [][]byte{
		fromRouter(stranger), fromRouter(stranger, 5), fromRouter(stranger)[:20], arp,
		fromRouter(stranger, 1, 2, 3), fromRouter(paths[1].packet("tcp", nil)),
	} {
		n.expect(frame, xdpPass, frame)
	}
}
