// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

// flooded is a worker whose Pod's SYNs are counted.
func flooded(t *testing.T, p path, flood bpfFlood) *network {
	t.Helper()
	n := newWorkerWith(t, func(c *bpfConfig) { c.Cookies, c.Mss4, c.Mss6 = 1, 1392, 1360 })
	n.put(n.Floods, bpfPodKey{Address: wireAddr(p.target().Addr()), Port: wirePort(p.target().Port()), Proto: protoTCP}, flood)
	return n
}

// routed is a namespace whose router is the way to the clients.
func routed(t *testing.T) (ns *testnet.Namespace, index uint32, router, own [6]byte) {
	t.Helper()
	outside := []netip.Prefix{netip.MustParsePrefix("10.0.0.254/24"), netip.MustParsePrefix("fd00::254/64")}
	pair, err := testnet.NewPair(outside, []netip.Prefix{netip.PrefixFrom(worker4, 24), netip.PrefixFrom(worker6, 64)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pair.Close)
	theirs, err := pair.Outside.MAC()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := pair.Inside.MAC()
	if err != nil {
		t.Fatal(err)
	}
	device, err := pair.Inside.Device(testnet.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	for i, everything := range []string{"0.0.0.0/0", "::/0"} {
		gateway := outside[i].Addr()
		if err := errors.Join(pair.Inside.SetNeighbour(gateway, theirs),
			pair.Inside.SetRoute(testnet.Route{To: netip.MustParsePrefix(everything), Via: []netip.Addr{gateway}})); err != nil {
			t.Fatal(err)
		}
	}
	return pair.Inside, uint32(device), [6]byte(theirs), [6]byte(ours)
}

// Below the threshold nothing is different.
func TestCookieThreshold(t *testing.T) {
	p := paths[3]
	n := flooded(t, p, bpfFlood{Threshold: 1000})
	n.expect(p.tunnelled("syn", nil), xdpPass, p.delivered("syn", nil))
	n.expectEvent(bpfEventEVENT_COOKIE_SENT, 0)
}

// Where no way leads to the client, the SYN is dropped, and makes no entry.
func TestCookieWithoutAWay(t *testing.T) {
	for _, p := range paths {
		n := flooded(t, p, bpfFlood{Threshold: 0, Through: uint64(coarseClock(t))})
		n.expectDrop(p.tunnelled("syn", nil), bpfDropDROP_COOKIE)
		n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
	}
}

// A SYN too many is answered with a cookie, which the kernel's function takes
// back; who answers it has a flow, and who guesses has none.
func TestCookie(t *testing.T) {
	need.Root(t)
	ns, index, router, own := routed(t)
	for _, p := range paths {
		n := flooded(t, p, bpfFlood{Threshold: 0, Through: uint64(coarseClock(t))})
		frame := p.tunnelled("syn", nil)
		options := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+256), Context: xdpContext{DataEnd: uint32(len(frame)), IngressIfindex: index}}
		var action uint32
		if err := ns.Do(func() (err error) { action, err = n.FairleadXdp.Run(&options); return err }); err != nil {
			t.Fatal(err)
		}
		if action != xdpTX {
			t.Fatalf("%s: action %d, drops %v", p.name, action, noteDrops(t, n.Drops))
		}
		packet, err := network3(options.DataOut)
		if err != nil {
			t.Fatal(err)
		}
		header := 20
		if p.vip.Is6() {
			header = 40
		}
		tcp := packet[header:]
		cookie, size := binary.BigEndian.Uint32(tcp[4:]), uint16(1392)
		if p.vip.Is6() {
			size = 1360
		}
		want := ipPacket{src: p.vip, dst: p.client, proto: protoTCP, ttl: 64, frag: 0x4000}
		want.payload = tcpSegment(netip.AddrPortFrom(p.vip, 80), netip.AddrPortFrom(p.client, 40000), tcpSYN|tcpACK, []byte{2, 4, byte(size >> 8), byte(size)})
		binary.BigEndian.PutUint32(want.payload[4:], cookie)
		binary.BigEndian.PutUint32(want.payload[8:], 2)
		want.payload[12] = 6 << 4
		binary.BigEndian.PutUint16(want.payload[14:], 64240)
		want.payload[16], want.payload[17] = 0, 0
		binary.BigEndian.PutUint16(want.payload[16:], transportSum(p.vip, p.client, protoTCP, want.payload))
		if got := ether(router, own, want.bytes()); !bytes.Equal(options.DataOut, got) {
			t.Errorf("%s: the answer is\n%swant\n%s", p.name, hex.Dump(options.DataOut), hex.Dump(got))
		}
		n.expectEvent(bpfEventEVENT_FLOW_NEW, 0)
		answer := func(ack uint32) []byte {
			in := p.packet("tcp", nil)
			binary.BigEndian.PutUint32(in.payload[4:], 2)
			binary.BigEndian.PutUint32(in.payload[8:], ack)
			return fromRouter(p.wrapped(in, p.hash(protoTCP), 1))
		}
		if guess := answer(cookie + 99); !p.holds() {
			n.expect(guess, xdpTX, denial(guess))
		}
		n.expectEvent(bpfEventEVENT_COOKIE_ACCEPTED, 0)
		n.expect(answer(cookie+1), xdpPass, nil)
		flow, ok := n.flow(n.Flows, p.flowKey(protoTCP))
		if !ok || flow.PodIsn != cookie || flow.PodAck != 2 || bpfFlowState(flow.State) != bpfFlowStateFLOW_ESTABLISHED {
			t.Errorf("%s: flow %+v, %v", p.name, flow, ok)
		}
		n.expectEvent(bpfEventEVENT_COOKIE_SENT, 1)
		n.expectEvent(bpfEventEVENT_COOKIE_ACCEPTED, 1)
	}
}

// A client that had a connection of the same ends before is not made up: the
// server gets its SYN, and may remember it.
func TestCookieOfOldClients(t *testing.T) {
	for _, p := range paths {
		n := flooded(t, p, bpfFlood{Threshold: 0, Through: uint64(coarseClock(t))})
		n.put(n.Flows, p.flowKey(protoTCP), bpfFlow{Pod: wireAddr(p.target().Addr()), PodPort: wirePort(p.target().Port()), State: uint8(bpfFlowStateFLOW_CLOSING),
			Fins: uint8(bpfFlowFinFLOW_CLOSED | bpfFlowFinFLOW_ARMED), Seen: uint64(coarseClock(t))})
		n.expect(p.tunnelled("syn", nil), xdpPass, p.delivered("syn", nil))
		n.expectEvent(bpfEventEVENT_COOKIE_SENT, 0)
	}
}

// One SYN a minute goes through, for the listener to know that it is flooded.
func TestCookieLetsThrough(t *testing.T) {
	p := paths[3]
	n := flooded(t, p, bpfFlood{Threshold: 0, Through: uint64(coarseClock(t) - 61*time.Second)})
	n.expect(p.tunnelled("syn", nil), xdpPass, p.delivered("syn", nil))
	other := p.packet("syn", nil)
	other.payload[1]++
	n.expectDrop(fromRouter(p.wrapped(other, p.hash(protoTCP), 1)), bpfDropDROP_COOKIE)
}
