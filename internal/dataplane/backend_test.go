// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
)

const (
	tcOK     = 0
	tcUnspec = 0xffffffff
	tcShot   = 2
	mss      = 1300
)

// newWorker is a backend's node: pod4 and pod6 serve the VIPs' port 80 at
// 8080, and a server holds each VIP for ipip.
func newWorker(t testing.TB) *network { return newWorkerWith(t, nil) }

func newWorkerWith(t testing.TB, edit func(*bpfConfig)) *network {
	t.Helper()
	n := newNetwork(t, func(c *bpfConfig) {
		c.Lb, c.Backend, c.Tag = 0, 1, testTag
		c.Node4, c.Node6 = wireAddr(worker4), wireAddr(worker6)
		c.Mss4, c.Mss6 = mss, mss
		c.IdleTcpNs, c.IdleUdpNs, c.IdleClosingNs = 3600e9, 3600e9, 3600e9
		if edit != nil {
			edit(c)
		}
	})
	for _, p := range []netip.Prefix{netip.PrefixFrom(node4, 32), netip.PrefixFrom(node6, 128)} {
		n.put(n.LbNodes, lbNodeKey(p), uint32(0))
	}
	for _, proto := range []uint8{protoTCP, protoUDP} {
		for vip, pod := range map[netip.Addr]netip.Addr{vip4: pod4, vip6: pod6} {
			front := netip.AddrPortFrom(vip, 80)
			n.pod(netip.AddrPortFrom(pod, podPort), proto, front)
			n.pod(front, proto, front)
		}
	}
	return n
}

func (n *network) pod(target netip.AddrPort, proto uint8, serves ...netip.AddrPort) {
	n.t.Helper()
	value := bpfPod{Count: uint32(len(serves))}
	for i, vip := range serves {
		value.Serves[i] = bpfVipPort{Vip: wireAddr(vip.Addr()), Port: wirePort(vip.Port())}
	}
	n.put(n.Pods, bpfPodKey{Address: wireAddr(target.Addr()), Port: wirePort(target.Port()), Proto: proto}, value)
}

// holds reports whether the server holds the VIP, so that nothing is translated.
func (p path) holds() bool { return p.mode == bpfModeMODE_IPIP }

func (p path) target() netip.AddrPort {
	if p.holds() {
		return netip.AddrPortFrom(p.vip, 80)
	}
	return netip.AddrPortFrom(p.pod, podPort)
}

// tunnelled is a client's packet as it comes out of an LB node.
func (p path) tunnelled(kind string, data []byte) []byte {
	proto := uint8(protoTCP)
	if kind == "udp" {
		proto = protoUDP
	}
	return fromRouter(p.wrapped(p.packet(kind, data), p.hash(proto), 1))
}

// delivered is what the Pod's stack gets of it.
func (p path) delivered(kind string, data []byte) []byte {
	in := p.packet(kind, data)
	in.ttl--
	in.dst = p.target().Addr()
	src := netip.AddrPortFrom(p.client, 40000)
	switch kind {
	case "tcp":
		in.payload = tcpSegment(src, p.target(), tcpACK, data)
	case "syn":
		in.payload = tcpSegment(src, p.target(), tcpSYN, data)
	case "udp":
		in.payload = udpDatagram(src, p.target(), data)
	}
	return fromRouter(in)
}

func (p path) flowKey(proto uint8) bpfFlowKey {
	return bpfFlowKey{Client: wireAddr(p.client), Vip: wireAddr(p.vip), ClientPort: wirePort(40000), VipPort: wirePort(80), Proto: proto}
}

func (n *network) flow(m *ebpf.Map, key bpfFlowKey) (bpfFlow, bool) {
	var flow bpfFlow
	return flow, m.Lookup(key, &flow) == nil
}

func TestDeliver(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n := newWorker(t)
			for kind, state := range map[string]bpfFlowState{"syn": bpfFlowStateFLOW_HALF_OPEN, "udp": bpfFlowStateFLOW_UNANSWERED} {
				for _, data := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("data"), 300)} {
					n.expect(p.tunnelled(kind, data), xdpPass, p.delivered(kind, data))
				}
				proto := uint8(protoTCP)
				if kind == "udp" {
					proto = protoUDP
				}
				flow, ok := n.flow(n.Pending, p.flowKey(proto))
				if !ok || bpfFlowState(flow.State) != state || flow.Pod != wireAddr(p.target().Addr()) || flow.PodPort != wirePort(p.target().Port()) {
					t.Errorf("%s: pending flow %+v, %v", kind, flow, ok)
				}
				if want := p.hash(proto); !p.holds() && flow.Hash != want {
					t.Errorf("%s: hash %#x, want %#x", kind, flow.Hash, want)
				}
			}
			n.expectEvent(bpfEventEVENT_FLOW_NEW, 2)
			n.expectEvent(bpfEventEVENT_DELIVERED, 6)
		})
	}
}

// An existing flow decides which Pod, whatever the LB node names.
func TestDeliverToTheFlowsPod(t *testing.T) {
	p := paths[3]
	n := newWorker(t)
	owner := netip.MustParseAddr("10.1.0.77")
	n.put(n.Flows, p.flowKey(protoTCP), bpfFlow{Pod: wireAddr(owner), PodPort: wirePort(9), State: uint8(bpfFlowStateFLOW_ESTABLISHED)})
	want := p.packet("tcp", nil)
	want.ttl--
	want.dst = owner
	want.payload = tcpSegment(netip.AddrPortFrom(p.client, 40000), netip.AddrPortFrom(owner, 9), tcpACK, nil)
	n.expect(p.tunnelled("tcp", nil), xdpPass, fromRouter(want))
	n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
}

// What passes by: tunnels of others, and everything that is no tunnel.
func TestNotForThisWorker(t *testing.T) {
	n := newWorker(t)
	for _, p := range paths {
		inner := p.packet("tcp", nil)
		n.expect(fromRouter(inner), xdpPass, fromRouter(inner))
		outer := p.wrapped(inner, 1, 1)
		outer.dst = netip.MustParseAddr("10.0.0.99")
		if outer.src.Is6() {
			outer.dst = netip.MustParseAddr("fd00::99")
		}
		n.expect(fromRouter(outer), xdpPass, fromRouter(outer))
	}
	n.expectEvent(bpfEventEVENT_DELIVERED, 0)
}

// offset of the Geneve option's fields in an IPv4 frame.
const (
	geneveAt = 14 + 20 + 8
	optionAt = geneveAt + 12
)

func TestTunnelDrops(t *testing.T) {
	p := paths[3] // geneve, 4in4
	for _, c := range []struct {
		name   string
		reason bpfDrop
		edit   func(frame []byte)
	}{
		{"reserved flag", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt+1] = 0 }},
		{"more options", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt]++ }},
		{"payload type", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt+2] = 0x65 }},
		{"class", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt+8] = 0 }},
		{"type", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt+10] = 1 }},
		{"length", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[geneveAt+11]-- }},
		{"version", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[optionAt]++ }},
		{"address length", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[optionAt+3] = 8 }},
		{"unknown verb", bpfDropDROP_TUNNEL_FORMAT, func(f []byte) { f[optionAt+1] = 9 }},
		{"bounce", bpfDropDROP_TUNNEL_BOUNCE, func(f []byte) { f[optionAt+1] = byte(bpfVerbVERB_DENIED) }},
		{"VNI", bpfDropDROP_TUNNEL_VNI, func(f []byte) { f[geneveAt+6]++ }},
		{"tag", bpfDropDROP_TUNNEL_TAG, func(f []byte) { f[optionAt+16]++ }},
		{"inner IP version", bpfDropDROP_MALFORMED, func(f []byte) { f[optionAt+36] = 0x95 }},
		{"inner length", bpfDropDROP_MALFORMED, func(f []byte) { f[optionAt+36+2]++ }},
		{"inner protocol", bpfDropDROP_PROTOCOL, func(f []byte) { f[optionAt+36+9] = 47 }},
		{"inner VIP", bpfDropDROP_TUNNEL_VIP, func(f []byte) { f[optionAt+36+19]++ }},
		{"later fragment", bpfDropDROP_FRAGMENT_UNKNOWN, func(f []byte) { f[optionAt+36+7] = 9 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newWorker(t)
			frame := p.tunnelled("syn", nil)
			c.edit(frame)
			n.expectDrop(frame, c.reason)
			n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
		})
	}
}

// denial is a tunnel packet that goes back: the way that it came, marked.
func denial(frame []byte) []byte {
	frame = slices.Clone(frame)
	for i := range 6 {
		frame[i], frame[6+i] = frame[6+i], frame[i]
	}
	at := 14 + 40
	if frame[12] == 8 {
		ip := frame[14 : 14+20]
		copy(ip[12:], slices.Concat(ip[16:20], ip[12:16]))
		at = 14 + 20
	} else {
		copy(frame[14+8:], slices.Concat(frame[14+24:14+40], frame[14+8:14+24]))
	}
	frame[at+8+12+1] = byte(bpfVerbVERB_DENIED)
	return frame
}

// What this node does not have goes back: a question about a flow that it does
// not know, and an order to a Pod that it does not know yet.
func TestDeny(t *testing.T) {
	for _, p := range paths[3:] {
		t.Run(p.name, func(t *testing.T) {
			n := newWorker(t)
			n.expect(p.tunnelled("tcp", nil), xdpTX, denial(p.tunnelled("tcp", nil)))
			p.pod = p.pod.Next()
			for _, kind := range []string{"syn", "udp"} {
				n.expect(p.tunnelled(kind, nil), xdpTX, denial(p.tunnelled(kind, nil)))
			}
			n.expectEvent(bpfEventEVENT_DENIED, 3)
			n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
		})
	}
	// IP-in-IP has no way to say no.
	n := newWorker(t)
	p := paths[0]
	p.vip = p.vip.Next()
	n.expectDrop(p.tunnelled("syn", nil), bpfDropDROP_TUNNEL_POD)
}

// Nothing of a stranger's is believed, however well it is made.
func TestTunnelSource(t *testing.T) {
	n := newWorker(t)
	for _, p := range paths {
		outer := p.wrapped(p.packet("syn", nil), p.hash(protoTCP), 1)
		outer.src = netip.MustParseAddr("10.0.0.66")
		if outer.dst.Is6() {
			outer.src = netip.MustParseAddr("fd00::66")
		}
		n.expectDrop(fromRouter(outer), bpfDropDROP_TUNNEL_SOURCE)
	}
	n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
}

// RFC 6040, figure 4: what comes out for each pair of marks.
func TestECN(t *testing.T) {
	const ect1, ect0, ce = 1, 2, 3
	p := paths[0] // ipip: nothing else changes
	n := newWorker(t)
	for _, c := range []struct{ inner, outer, want byte }{
		{0, 0, 0}, {0, ect0, 0}, {0, ect1, 0},
		{ect0, 0, ect0}, {ect0, ect0, ect0}, {ect0, ect1, ect1}, {ect0, ce, ce},
		{ect1, 0, ect1}, {ect1, ect0, ect1}, {ect1, ect1, ect1}, {ect1, ce, ce},
		{ce, 0, ce}, {ce, ect0, ce}, {ce, ect1, ce}, {ce, ce, ce},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			for _, p := range []path{paths[0], paths[1]} {
				in := p.packet("syn", nil)
				in.tos = in.tos&^3 | c.inner
				outer := p.wrapped(in, 1, 1)
				outer.tos = outer.tos&^3 | c.outer
				in.tos, in.ttl = in.tos&^3|c.want, in.ttl-1
				n.expect(fromRouter(outer), xdpPass, fromRouter(in))
			}
		})
	}
	in := p.packet("syn", nil)
	in.tos = 0
	outer := p.wrapped(in, 1, 1)
	outer.tos = ce
	n.expectDrop(fromRouter(outer), bpfDropDROP_TUNNEL_ECN)
}

func TestFlowsFull(t *testing.T) {
	p := paths[3]
	n := newWorker(t)
	keys, values := make([]bpfFlowKey, n.Flows.MaxEntries()), make([]bpfFlow, n.Flows.MaxEntries())
	for i := range keys {
		keys[i] = bpfFlowKey{Client: bpfAddr{W: [4]uint32{1, 2, 3, uint32(i)}}}
	}
	if _, err := n.Flows.BatchUpdate(keys, values, nil); err != nil {
		t.Fatal(err)
	}
	n.expect(p.tunnelled("udp", nil), xdpPass, nil)
	before := noteDrops(t, n.Drops)[bpfDropDROP_FLOWS_FULL]
	if action, _ := n.runBy(n.FairleadEgress, p.answerFrame(protoUDP, nil)); action != tcShot {
		t.Errorf("an answer that cannot be confirmed: action %d", action)
	}
	if after := noteDrops(t, n.Drops)[bpfDropDROP_FLOWS_FULL]; after != before+1 {
		t.Errorf("drops: %d, then %d", before, after)
	}
}

func TestFlowConflict(t *testing.T) {
	p := paths[3]
	n := newWorker(t)
	other := netip.MustParseAddrPort("192.0.2.77:80")
	n.pod(p.target(), protoTCP, netip.AddrPortFrom(p.vip, 80), other)
	key := p.flowKey(protoTCP)
	key.Vip = wireAddr(other.Addr())
	n.put(n.Flows, key, bpfFlow{Pod: wireAddr(p.pod), PodPort: wirePort(podPort), State: uint8(bpfFlowStateFLOW_ESTABLISHED)})
	n.expectDrop(p.tunnelled("syn", nil), bpfDropDROP_FLOW_CONFLICT)
}

// answerFrame is a frame of the Pod's to the client, as it leaves.
func (p path) answerFrame(proto uint8, data []byte) []byte {
	return ether(routerMAC, ownMAC, p.answerFrom(p.target(), proto, tcpACK, data).bytes())
}

func (p path) answerFrom(src netip.AddrPort, proto uint8, flags byte, data []byte) ipPacket {
	dst := netip.AddrPortFrom(p.client, 40000)
	out := ipPacket{src: src.Addr(), dst: p.client, proto: proto, ttl: 63, frag: 0x4000}
	if proto == protoUDP {
		out.payload = udpDatagram(src, dst, data)
	} else {
		out.payload = tcpSegment(src, dst, flags, data)
	}
	return out
}

// The whole of a connection: SYN, SYN-ACK with its MSS clamped, the ACK that
// proves it, and not one that proves nothing.
func TestHandshake(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n := newWorker(t)
			key := p.flowKey(protoTCP)
			n.expect(p.tunnelled("syn", nil), xdpPass, p.delivered("syn", nil))
			vip := netip.AddrPortFrom(p.vip, 80)
			n.expectAnswer(p.synAck(p.target(), 1460), p.synAck(vip, mss))
			n.expectEvent(bpfEventEVENT_MSS_CLAMPED, 1)

			wrong := p.packet("tcp", nil)
			wrong.payload = withAck(p, 99)
			question := fromRouter(p.wrapped(wrong, 1, 1))
			if p.holds() {
				n.expect(question, xdpPass, nil)
			} else {
				n.expect(question, xdpTX, nil) // it is no packet of this connection
				n.expect(ordered(question), xdpPass, nil)
			}
			if _, ok := n.flow(n.Flows, key); ok {
				t.Error("an ACK of nothing proved the connection")
			}
			right := p.packet("tcp", nil)
			right.payload = withAck(p, 2)
			n.expect(fromRouter(p.wrapped(right, 1, 1)), xdpPass, nil)
			if flow, ok := n.flow(n.Flows, key); !ok || bpfFlowState(flow.State) != bpfFlowStateFLOW_ESTABLISHED {
				t.Errorf("after the handshake: %+v, %v", flow, ok)
			}
			if _, ok := n.flow(n.Pending, key); ok {
				t.Error("still pending after the handshake")
			}
			data := []byte("hello")
			n.expectAnswer(p.answerFrame(protoTCP, data), ether(routerMAC, ownMAC, p.answerFrom(vip, protoTCP, tcpACK, data).bytes()))
			n.expectEvent(bpfEventEVENT_FLOW_CONFIRMED, 1)
		})
	}
}

// withAck is a client's segment that acknowledges ack.
func withAck(p path, ack byte) []byte {
	src, dst := netip.AddrPortFrom(p.client, 40000), netip.AddrPortFrom(p.vip, 80)
	b := tcpSegment(src, dst, tcpACK, nil)
	b[11], b[16], b[17] = ack, 0, 0
	binary.BigEndian.PutUint16(b[16:], transportSum(src.Addr(), dst.Addr(), protoTCP, b))
	return b
}

// synAck offers an MSS behind a NOP.
func (p path) synAck(src netip.AddrPort, size uint16) []byte {
	dst := netip.AddrPortFrom(p.client, 40000)
	out := p.answerFrom(src, protoTCP, tcpSYN|tcpACK, nil)
	b := slices.Clone(out.payload)
	b[12], b[16], b[17] = 7<<4, 0, 0
	b = append(b, 1, 2, 4, byte(size>>8), byte(size), 3, 3, 7)
	binary.BigEndian.PutUint16(b[16:], transportSum(src.Addr(), dst.Addr(), protoTCP, b))
	out.payload = b
	return ether(routerMAC, ownMAC, out.bytes())
}

func (n *network) expectAnswer(frame, want []byte) {
	n.t.Helper()
	action, out := n.runBy(n.FairleadEgress, frame)
	if action != tcUnspec && action != tcOK || !bytes.Equal(out, want) {
		n.t.Errorf("action %d, frame\n%swant\n%s", action, hex.Dump(out), hex.Dump(want))
	}
}

func TestAnswerUDP(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n := newWorker(t)
			n.expectAnswer(p.answerFrame(protoUDP, []byte("a")), p.answerFrame(protoUDP, []byte("a"))) // of no flow
			n.expect(p.tunnelled("udp", nil), xdpPass, nil)
			want := ether(routerMAC, ownMAC, p.answerFrom(netip.AddrPortFrom(p.vip, 80), protoUDP, 0, []byte("ab")).bytes())
			n.expectAnswer(p.answerFrame(protoUDP, []byte("ab")), want)
			if _, ok := n.flow(n.Flows, p.flowKey(protoUDP)); !ok {
				t.Error("an answer did not confirm the flow")
			}
		})
	}
}

// An ICMP error about an answer reaches the Pod that sent it, as one about its
// own packet; one about no flow does not.
func TestErrorAboutAnAnswer(t *testing.T) {
	for _, p := range paths[3:] {
		t.Run(p.name, func(t *testing.T) {
			n := newWorker(t)
			about := func(src netip.AddrPort) ipPacket {
				quoted := p.answerFrom(src, protoUDP, 0, []byte("abcd"))
				kind := byte(3)
				if p.vip.Is6() {
					kind = 1
				}
				router := p.client.Next()
				return ipPacket{src: router, dst: src.Addr(), proto: icmpProto(p.vip), ttl: 60,
					payload: icmpMessage(router, src.Addr(), kind, 1, 0, quoted.bytes())}
			}
			frame := fromRouter(p.wrapped(about(netip.AddrPortFrom(p.vip, 80)), 1, 1))
			n.expectDrop(ordered(frame), bpfDropDROP_ICMP_UNRELATED)
			n.expect(frame, xdpTX, denial(frame))
			n.expect(p.tunnelled("udp", nil), xdpPass, nil)
			want := about(p.target())
			want.ttl--
			_, out := n.run(frame)
			if !icmpSumRight(out, p.pod, want.src) {
				t.Errorf("the ICMP checksum is wrong\n%s", hex.Dump(out))
			}
			// The quoted transport checksum stays the VIP's: it is not checked.
			clear(out[len(out)-6 : len(out)-4])
			expected := fromRouter(want)
			clear(expected[len(expected)-6 : len(expected)-4])
			sum := checksumAt(p.vip)
			clear(out[sum : sum+2])
			clear(expected[sum : sum+2])
			if !bytes.Equal(out, expected) {
				t.Errorf("frame\n%swant\n%s", hex.Dump(out), hex.Dump(expected))
			}
		})
	}
}

// icmpSumRight sums what was sent, checksum included: nothing is left over.
func icmpSumRight(frame []byte, dst, src netip.Addr) bool {
	message := frame[checksumAt(dst)-2:]
	if dst.Is4() {
		return internetSum(message) == 0
	}
	return transportSum(src, dst, protoICMPv6, message) == 0
}

// checksumAt is the offset of ICMP's checksum.
func checksumAt(a netip.Addr) int {
	if a.Is4() {
		return 14 + 20 + 2
	}
	return 14 + 40 + 2
}

func TestPodMaySendNoTunnels(t *testing.T) {
	n := newWorker(t)
	for _, p := range paths {
		outer := p.wrapped(p.packet("syn", nil), 1, 1)
		outer.src = p.pod
		if outer.dst.Is4() != outer.src.Is4() {
			outer.src = outer.dst.Next()
		}
		before := noteDrops(t, n.Drops)[bpfDropDROP_FROM_POD_TUNNEL]
		if action, _ := n.runBy(n.FairleadPod, fromRouter(outer)); action != tcShot {
			t.Errorf("%s: action %d", p.name, action)
		}
		if after := noteDrops(t, n.Drops)[bpfDropDROP_FROM_POD_TUNNEL]; after != before+1 {
			t.Errorf("%s: counted %d", p.name, after-before)
		}
	}
	other := fromRouter(ipPacket{src: pod4, dst: client4, proto: protoUDP, ttl: 64, payload: udpDatagram(
		netip.AddrPortFrom(pod4, 7), netip.AddrPortFrom(client4, 9), nil)})
	if action, out := n.runBy(n.FairleadPod, other); action != tcUnspec || !bytes.Equal(out, other) {
		t.Errorf("other traffic of a Pod: action %d", action)
	}
}
