// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// established is a worker with one connection whose handshake is over.
func established(t *testing.T, p path) *network {
	t.Helper()
	n := newWorker(t)
	n.expect(p.tunnelled("syn", nil), xdpPass, nil)
	n.expectAnswer(p.synAck(p.target(), 1460), p.synAck(netip.AddrPortFrom(p.vip, 80), mss))
	right := p.packet("tcp", nil)
	right.payload = withAck(p, 2)
	n.expect(fromRouter(p.wrapped(right, 1, 1)), xdpPass, nil)
	return n
}

// blind is a segment of the flow by somebody who does not see it: an LB node
// passes it on as an order or as a question.
func (p path) blind(random *rand.Rand, flags byte, order bool) []byte {
	packet := p.packet("tcp", nil)
	src, dst := netip.AddrPortFrom(p.client, 40000), netip.AddrPortFrom(p.vip, 80)
	b := tcpSegment(src, dst, flags, nil)
	binary.BigEndian.PutUint32(b[4:], random.Uint32())
	binary.BigEndian.PutUint32(b[8:], random.Uint32())
	packet.payload = b
	frame := fromRouter(p.wrapped(packet, p.hash(protoTCP), 1))
	if order {
		return ordered(frame)
	}
	return frame
}

// Who does not see a connection cannot close it, nor move it to another Pod.
// The window of 64 KiB lets one blind segment in 65,536 in, which a Pod's
// kernel then judges; none of these may count as an end.
func TestBlindSegments(t *testing.T) {
	p := paths[3]
	n := established(t, p)
	random := rand.New(rand.NewPCG(21, 22))
	before, ok := n.flow(n.Flows, p.flowKey(protoTCP))
	if !ok {
		t.Fatal("no connection to attack")
	}
	for range 5000 {
		for _, flags := range []byte{tcpRST, tcpRST | tcpACK, tcpFIN | tcpACK, tcpSYN, tcpACK, tcpSYN | tcpACK, tcpSYN | tcpFIN | tcpRST} {
			n.run(p.blind(random, flags, random.IntN(2) == 0))
		}
	}
	after, ok := n.flow(n.Flows, p.flowKey(protoTCP))
	if !ok || bpfFlowState(after.State) != bpfFlowStateFLOW_ESTABLISHED || after.Pod != before.Pod || after.PodPort != before.PodPort ||
		after.PodAck != before.PodAck || after.PodIsn != before.PodIsn {
		t.Errorf("the connection was\n%+v, and is %v\n%+v", before, ok, after)
	}
	n.expectEvent(bpfEventEVENT_FLOW_CLOSED, 0)
	n.expectEvent(bpfEventEVENT_FLOW_NEW, 1)
	// And it goes on.
	right := p.packet("tcp", []byte("more"))
	right.payload = withAck(p, 2)
	n.expect(fromRouter(p.wrapped(right, 1, 1)), xdpPass, nil)
}

// A flood of first packets pushes out other first packets alone.
func TestFloodsOfFirstPackets(t *testing.T) {
	p := paths[3]
	n := established(t, p)
	for i := range 200_000 {
		flood := p
		flood.client = netip.AddrFrom4([4]byte{198, 18, byte(i >> 8), byte(i)})
		packet := flood.packet([]string{"syn", "udp"}[i%2], nil)
		binary.BigEndian.PutUint16(packet.payload, uint16(i>>4))
		if action, _ := n.run(fromRouter(flood.wrapped(packet, 1, 1))); action != xdpPass {
			t.Fatalf("packet %d: action %d, drops %v", i, action, noteDrops(t, n.Drops))
		}
	}
	if _, ok := n.flow(n.Flows, p.flowKey(protoTCP)); !ok {
		t.Error("an established connection was pushed out")
	}
	confirmed := 0
	each(t, n.Flows, func(bpfFlowKey, bpfFlow) { confirmed++ })
	if confirmed != 1 {
		t.Errorf("%d flows are confirmed", confirmed)
	}
}

// A bounce that is sent again and again makes one packet of each, and the flow
// still finds its owner.
func TestReplayedBounces(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	in := p.packet("tcp", []byte("data"))
	replayed := c.denied(in, 0, 1)
	for range 100 {
		c.expect(replayed, xdpTX, c.sent(in, 1, bpfVerbVERB_ASK, 2))
	}
	// The owner is the last candidate: a detour of one bounce finds it.
	c.expect(fromRouter(in), xdpTX, c.sent(in, 1, bpfVerbVERB_ASK, 0))
	c.expect(c.denied(in, 1, 0), xdpTX, c.sent(in, 0, bpfVerbVERB_ASK, 1))
	c.expect(c.denied(in, 0, 1), xdpTX, c.sent(in, 1, bpfVerbVERB_ASK, 2))
	c.expect(c.denied(in, 1, 2), xdpTX, c.sent(in, 2, bpfVerbVERB_ASK, 3))
	c.expect(fromRouter(in), xdpTX, c.sent(in, 2, bpfVerbVERB_ASK, 0))
}
