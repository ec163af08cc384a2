// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	natFirst = 61000
	natPorts = 4536
)

var natPaths = []path{
	{"nat/4", bpfModeMODE_NAT, client4, vip4, pod4, pod4, node4},
	{"nat/6", bpfModeMODE_NAT, client6, vip6, pod6, pod6, node6},
}

func withNAT(c *bpfConfig) {
	c.NatFirst, c.NatPorts, c.Nat4Count, c.Nat6Count = natFirst, natPorts, 1, 1
	c.Nat4[0], c.Nat6[0] = wireAddr(node4), wireAddr(node6)
	c.IdleTcpNs, c.IdleUdpNs, c.IdleClosingNs = 3600e9, 60e9, 60e9
}

// nat is a network with one backend of mode NAT and its TCP and UDP services.
func (p path) nat(t testing.TB, vlan uint16) (*network, uint32) {
	t.Helper()
	n, number := p.one(t, withNAT, ingress, 1500, vlan)
	n.flag(1, bpfServiceFlagSERVICE_NAT)
	n.flag(2, bpfServiceFlagSERVICE_NAT)
	return n, number
}

// local is the n-th port that a flow of the client tries.
func (p path) local(proto uint8, try int) uint16 {
	return uint16(natFirst + (uint32(p.hash(proto)>>16)+uint32(try)*1031)%natPorts)
}

// between is a packet with these ends in place of its own.
func (p path) between(kind string, src, dst netip.AddrPort, flags byte, data []byte) ipPacket {
	in := p.packet(kind, nil)
	in.src, in.dst = src.Addr(), dst.Addr()
	if kind == "udp" {
		in.payload = udpDatagram(src, dst, data)
	} else {
		in.payload = tcpSegment(src, dst, flags, data)
	}
	return in
}

func (p path) clientEnd() netip.AddrPort  { return netip.AddrPortFrom(p.client, 40000) }
func (p path) vipEnd() netip.AddrPort     { return netip.AddrPortFrom(p.vip, 80) }
func (p path) backendEnd() netip.AddrPort { return netip.AddrPortFrom(p.pod, podPort) }
func (p path) localEnd(proto uint8, try int) netip.AddrPort {
	return netip.AddrPortFrom(p.node, p.local(proto, try))
}

func less(in ipPacket) ipPacket {
	in.ttl--
	return in
}

// Both ends are replaced, both ways, with the checksums; answers go back by the
// way that the client's packet came.
func TestNAT(t *testing.T) {
	for _, p := range natPaths {
		for _, kind := range []string{"tcp", "udp"} {
			for _, tag := range []uint16{0, 9} {
				t.Run(fmt.Sprintf("%s/%s/%d", p.name, kind, tag), func(t *testing.T) {
					n, number := p.nat(t, tag)
					proto := uint8(protoTCP)
					if kind == "udp" {
						proto = protoUDP
					}
					var tags []uint16
					if tag != 0 {
						tags = []uint16{tag}
					}
					local := p.localEnd(proto, 0)
					for _, data := range [][]byte{nil, []byte("odd"), []byte("some data")} {
						flags := byte(tcpACK)
						if data == nil {
							flags = tcpSYN
						}
						there := p.between(kind, p.clientEnd(), p.vipEnd(), flags, data)
						n.expect(fromRouter(there, tags...), xdpTX, ether(workerMAC, ownMAC, less(p.between(kind, local, p.backendEnd(), flags, data)).bytes(), tags...))
						back := p.between(kind, p.backendEnd(), local, tcpACK, data)
						n.expect(ether(ownMAC, workerMAC, back.bytes()), xdpTX, ether(routerMAC, ownMAC, less(p.between(kind, p.vipEnd(), p.clientEnd(), tcpACK, data)).bytes(), tags...))
					}
					if got := n.counter(n.BackendCounters, number); got.Packets != 3 {
						t.Errorf("backend counter %+v", got)
					}
					n.expectEvent(bpfEventEVENT_NAT_NEW, 1)
				})
			}
		}
	}
}

func (p path) natKey(proto uint8, try int) bpfNatKey {
	return bpfNatKey{Backend: wireAddr(p.pod), Local: wireAddr(p.node), BackendPort: wirePort(podPort), LocalPort: wirePort(p.local(proto, try)), Proto: proto}
}

func (n *network) natFlow(key bpfNatKey) (bpfNatFlow, bool) {
	var flow bpfNatFlow
	return flow, n.NatFlows.Lookup(key, &flow) == nil
}

// A connection opens by the answer, and closes by FINs of both sides, or the
// backend's reset; a client's own reset proves nothing.
func TestNATStates(t *testing.T) {
	for _, p := range natPaths {
		n, _ := p.nat(t, 0)
		local := p.localEnd(protoTCP, 0)
		client := func(flags byte) { n.run(fromRouter(p.between("tcp", p.clientEnd(), p.vipEnd(), flags, nil))) }
		backend := func(flags byte) {
			n.run(ether(ownMAC, workerMAC, p.between("tcp", p.backendEnd(), local, flags, nil).bytes()))
		}
		expect := func(what string, state bpfNatState) {
			t.Helper()
			if flow, ok := n.natFlow(p.natKey(protoTCP, 0)); !ok || bpfNatState(flow.State) != state {
				t.Errorf("%s, %s: state %d, %v; want %d", p.name, what, flow.State, ok, state)
			}
		}
		client(tcpSYN)
		expect("SYN", bpfNatStateNAT_OPENING)
		client(tcpRST)
		expect("the client's reset", bpfNatStateNAT_OPENING)
		backend(tcpSYN | tcpACK)
		expect("SYN-ACK", bpfNatStateNAT_OPEN)
		client(tcpFIN | tcpACK)
		expect("the client's FIN", bpfNatStateNAT_OPEN)
		backend(tcpFIN | tcpACK)
		expect("both FINs", bpfNatStateNAT_CLOSING)
		client(tcpSYN)
		expect("the same ports again", bpfNatStateNAT_OPENING)
		backend(tcpRST)
		expect("the backend's reset", bpfNatStateNAT_CLOSING)
	}
}

// What belongs to no connection of this node is dropped; what a stranger sends
// to the local port goes up the stack, and so does everything else.
func TestNATOfOthers(t *testing.T) {
	for _, p := range natPaths {
		n, _ := p.nat(t, 0)
		n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_NAT_UNKNOWN)
		n.expect(fromRouter(p.packet("syn", nil)), xdpTX, nil)
		local := p.localEnd(protoTCP, 0)
		for _, ends := range [][2]netip.AddrPort{
			{netip.AddrPortFrom(p.client, 40000), local},                             // no backend
			{netip.AddrPortFrom(p.pod, podPort+1), local},                            // another port of it
			{p.backendEnd(), netip.AddrPortFrom(p.node, local.Port()+1)},             // another flow's
			{p.backendEnd(), netip.AddrPortFrom(p.node, 22)},                         // none of the ports
			{p.backendEnd(), netip.AddrPortFrom(p.node.Next().Next(), local.Port())}, // another address
		} {
			frame := ether(ownMAC, workerMAC, p.between("tcp", ends[0], ends[1], tcpACK, nil).bytes())
			n.expect(frame, xdpPass, frame)
		}
	}
}

// All ports that a flow may have are taken: it is refused and counted, until one
// has expired.
func TestNATPortsTaken(t *testing.T) {
	for _, p := range natPaths {
		n, _ := p.nat(t, 0)
		other := bpfNatFlow{Client: wireAddr(p.client.Next()), Vip: wireAddr(p.vip), ClientPort: 1, VipPort: wirePort(80), State: uint8(bpfNatStateNAT_OPEN), Seen: uint64(coarseClock(t))}
		for try := range 8 {
			n.put(n.NatFlows, p.natKey(protoTCP, try), other)
		}
		n.expectDrop(fromRouter(p.packet("syn", nil)), bpfDropDROP_NAT_PORTS)
		other.Seen -= uint64(2 * time.Hour)
		n.put(n.NatFlows, p.natKey(protoTCP, 5), other)
		in := p.packet("syn", nil)
		n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, less(p.between("tcp", p.localEnd(protoTCP, 5), p.backendEnd(), tcpSYN, nil)).bytes()))
	}
}

func TestNATFull(t *testing.T) {
	p := natPaths[0]
	n, _ := p.nat(t, 0)
	for i := range n.NatFlows.MaxEntries() {
		key := p.natKey(protoUDP, 0)
		key.Backend.W[0] = i + 1
		n.put(n.NatFlows, key, bpfNatFlow{})
	}
	n.expectDrop(fromRouter(p.packet("syn", nil)), bpfDropDROP_NAT_FULL)
}

// A socket of this node keeps its port: the flow takes the next one.
func TestNATShadowsNoSocket(t *testing.T) {
	p := path{"", bpfModeMODE_NAT, client4, vip4, pod4, pod4, netip.MustParseAddr("127.0.0.9")}
	n, _ := p.one(t, func(c *bpfConfig) {
		withNAT(c)
		c.Nat4[0] = wireAddr(p.node)
	}, ingress, 1500, 0)
	n.flag(1, bpfServiceFlagSERVICE_NAT)
	n.flag(2, bpfServiceFlagSERVICE_NAT)
	free := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	listener, err := free.Listen(context.Background(), "tcp", p.localEnd(protoTCP, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	n.expect(fromRouter(p.packet("syn", nil)), xdpTX, ether(workerMAC, ownMAC, less(p.between("tcp", p.localEnd(protoTCP, 1), p.backendEnd(), tcpSYN, nil)).bytes()))
	socket, err := free.ListenPacket(context.Background(), "udp", p.localEnd(protoUDP, 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	n.expect(fromRouter(p.packet("udp", nil)), xdpTX, ether(workerMAC, ownMAC, less(p.between("udp", p.localEnd(protoUDP, 1), p.backendEnd(), 0, nil)).bytes()))
	n.expectEvent(bpfEventEVENT_NAT_RETRY, 2)
}

// A backend that connects to its own VIP sees the LB node, and answers there.
func TestNATHairpin(t *testing.T) {
	for _, p := range natPaths {
		p.client = p.pod
		n, _ := p.nat(t, 0)
		n.expect(fromRouter(p.packet("syn", nil)), xdpTX, ether(workerMAC, ownMAC, less(p.between("tcp", p.localEnd(protoTCP, 0), p.backendEnd(), tcpSYN, nil)).bytes()))
		back := p.between("tcp", p.backendEnd(), p.localEnd(protoTCP, 0), tcpSYN|tcpACK, nil)
		n.expect(ether(ownMAC, workerMAC, back.bytes()), xdpTX, ether(routerMAC, ownMAC, less(p.between("tcp", p.vipEnd(), p.clientEnd(), tcpSYN|tcpACK, nil)).bytes()))
	}
}

// In a contested slot the flow stays with the backend that has it.
func TestNATContested(t *testing.T) {
	for _, p := range natPaths {
		n, number := p.nat(t, 0)
		n.expect(fromRouter(p.packet("syn", nil)), xdpTX, nil)
		fresh := n.backend(p.mode, netip.AddrPortFrom(p.pod.Next(), podPort), p.pod.Next(), 1)
		n.put(n.Candidates, uint32(1), bpfCandidateRow{Number: [7]uint32{number}})
		for slot := range n.slots {
			n.put(n.bpfObjects.Slots, slot, uint64(fresh)|1<<32)
		}
		n.expect(fromRouter(p.packet("tcp", nil)), xdpTX, ether(workerMAC, ownMAC, less(p.between("tcp", p.localEnd(protoTCP, 0), p.backendEnd(), tcpACK, nil)).bytes()))
		other := p
		other.client = p.client.Next()
		in := other.packet("syn", nil)
		other.pod = p.pod.Next()
		n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, less(other.between("tcp", other.localEnd(protoTCP, 0), other.backendEnd(), tcpSYN, nil)).bytes()))
		n.setState(number, bpfBackendStateBACKEND_GONE, 1)
		n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_NAT_UNKNOWN)
	}
}

// Errors about either half of a flow reach who sent the packet, as if about
// what they sent.
func TestNATErrors(t *testing.T) {
	for _, p := range natPaths {
		n, _ := p.nat(t, 0)
		n.expect(fromRouter(p.packet("syn", nil)), xdpTX, nil)
		hop, kind, proto := netip.MustParseAddr("198.51.100.77"), byte(3), byte(protoICMP)
		if p.vip.Is6() {
			hop, kind, proto = netip.MustParseAddr("2001:db8:77::1"), 1, protoICMPv6
		}
		local := p.localEnd(protoTCP, 0)
		about := func(from, src, dst netip.Addr, quoted ipPacket) ipPacket {
			return ipPacket{src: src, dst: dst, proto: proto, ttl: 60, payload: icmpMessage(src, dst, kind, 1, 0, quoted.bytes())}
		}
		// The transport checksum that is quoted stays what it was.
		quote := func(src, dst netip.AddrPort, like ipPacket) ipPacket {
			q := p.between("tcp", src, dst, tcpACK, nil)
			copy(q.payload[16:18], like.payload[16:18])
			return q
		}
		sent := p.between("tcp", local, p.backendEnd(), tcpACK, nil)
		n.expect(ether(ownMAC, workerMAC, about(hop, hop, p.node, sent).bytes()), xdpTX,
			ether(routerMAC, ownMAC, less(about(hop, p.vip, p.client, quote(p.clientEnd(), p.vipEnd(), sent))).bytes()))
		answered := p.between("tcp", p.vipEnd(), p.clientEnd(), tcpACK, nil)
		n.expect(fromRouter(about(hop, hop, p.vip, answered)), xdpTX,
			ether(workerMAC, ownMAC, less(about(hop, p.node, p.pod, quote(p.backendEnd(), local, answered))).bytes()))
		unknown := p.between("tcp", p.vipEnd(), netip.AddrPortFrom(p.client.Next(), 1), tcpACK, nil)
		n.expectDrop(fromRouter(about(hop, hop, p.vip, unknown)), bpfDropDROP_ICMP_UNRELATED)
	}
}

// Later fragments follow the first, both ways.
func TestNATFragments(t *testing.T) {
	p := natPaths[0]
	n, _ := p.nat(t, 0)
	cut := func(whole ipPacket) (first, later ipPacket) {
		first, later = whole, whole
		first.frag, later.frag = 0x2000, 5
		first.payload, later.payload = slices.Clone(whole.payload[:40]), slices.Clone(whole.payload[40:])
		return first, later
	}
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data, 7)
	first, later := cut(p.packet("udp", data))
	wantFirst, wantLater := cut(less(p.between("udp", p.localEnd(protoUDP, 0), p.backendEnd(), 0, data)))
	n.expect(fromRouter(first), xdpTX, ether(workerMAC, ownMAC, wantFirst.bytes()))
	n.expect(fromRouter(later), xdpTX, ether(workerMAC, ownMAC, wantLater.bytes()))
	first, later = cut(p.between("udp", p.backendEnd(), p.localEnd(protoUDP, 0), 0, data))
	wantFirst, wantLater = cut(less(p.between("udp", p.vipEnd(), p.clientEnd(), 0, data)))
	n.expect(ether(ownMAC, workerMAC, first.bytes()), xdpTX, ether(routerMAC, ownMAC, wantFirst.bytes()))
	n.expect(ether(ownMAC, workerMAC, later.bytes()), xdpTX, ether(routerMAC, ownMAC, wantLater.bytes()))
}

// Frames that are nearly right do no harm: what leaves goes to a backend from a
// local address, or to a client from the VIP, or is as it came.
func TestNATMutilatedFrames(t *testing.T) {
	n := newNetwork(t, withNAT)
	var seeds [][]byte
	row := n.hop(ingress, 1500, 0)
	for _, p := range natPaths {
		number := n.backend(p.mode, p.backendEnd(), p.pod, row)
		for _, proto := range []uint8{protoTCP, protoUDP} {
			n.flag(n.service(p.vip, 80, proto, number), bpfServiceFlagSERVICE_NAT)
		}
		for kind, proto := range map[string]uint8{"syn": protoTCP, "tcp": protoTCP, "udp": protoUDP} {
			seeds = append(seeds, fromRouter(p.packet(kind, []byte("some data"))), fromRouter(p.packet(kind, nil), 5),
				ether(ownMAC, workerMAC, p.between(kind, p.backendEnd(), p.localEnd(proto, 0), tcpACK, []byte("data")).bytes()))
			quoted := p.between(kind, p.localEnd(proto, 0), p.backendEnd(), tcpACK, nil)
			what := ipPacket{src: p.pod, dst: p.node, proto: protoICMP, ttl: 60, payload: icmpMessage(p.pod, p.node, 3, 1, 0, quoted.bytes())}
			if p.vip.Is6() {
				what.proto, what.payload = protoICMPv6, icmpMessage(p.pod, p.node, 1, 1, 0, quoted.bytes())
			}
			seeds = append(seeds, ether(ownMAC, workerMAC, what.bytes()))
		}
	}
	random, sent := rand.New(rand.NewPCG(3, 4)), map[string]int{}
	for round := range 100_000 {
		frame := bytes.Clone(seeds[random.IntN(len(seeds))])
		for range random.IntN(4) {
			at := 12 + random.IntN(len(frame)-12)
			frame[at] = []byte{byte(random.Uint32()), frame[at] ^ 1<<random.IntN(8), 0, 0xff}[random.IntN(4)]
		}
		if random.IntN(4) == 0 {
			frame = frame[:14+random.IntN(len(frame)-13)]
		}
		action, out := n.run(frame)
		switch action {
		case xdpDrop:
			sent["drop"]++
			continue
		case xdpPass:
			sent["pass"]++
			if !bytes.Equal(frame, out) {
				t.Fatalf("round %d: what passes was changed\n%s%s", round, hex.Dump(frame), hex.Dump(out))
			}
			continue
		}
		src, err := source(out)
		must(t, err)
		dst, err := destination(out)
		must(t, err)
		switch {
		case (src == node4 || src == node6) && (dst == pod4 || dst == pod6):
			sent["to the backend"]++
		case (src == vip4 || src == vip6 || src == node4 || src == node6) && bytes.Contains(frame, dst.AsSlice()):
			sent["reply"]++
		case src == vip4 || src == vip6:
			sent["to a client"]++
		default:
			t.Fatalf("round %d: from %s to %s\n%s%s", round, src, dst, hex.Dump(frame), hex.Dump(out))
		}
	}
	for _, kind := range []string{"drop", "pass", "to the backend", "reply", "to a client"} {
		if sent[kind] < 100 {
			t.Errorf("%q was reached %d times: %v", kind, sent[kind], sent)
		}
	}
}
