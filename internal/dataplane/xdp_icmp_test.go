// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

func icmpProto(a netip.Addr) byte {
	if a.Is4() {
		return protoICMP
	}
	return protoICMPv6
}

func TestEcho(t *testing.T) {
	for _, p := range []path{paths[0], paths[1]} {
		request, reply := byte(8), byte(0)
		if p.vip.Is6() {
			request, reply = 128, 129
		}
		n, _ := p.one(t, nil, ingress, 1500, 0)
		in := ipPacket{src: p.client, dst: p.vip, proto: icmpProto(p.vip), ttl: 1, id: 3,
			payload: icmpMessage(p.client, p.vip, request, 0, 0x00010002, []byte("ping"))}
		out := in
		out.src, out.dst, out.ttl = p.vip, p.client, 64
		out.payload = icmpMessage(p.vip, p.client, reply, 0, 0x00010002, []byte("ping"))
		n.expect(fromRouter(in, 5), xdpTX, ether(routerMAC, ownMAC, out.bytes(), 5))
		n.expectEvent(bpfEventEVENT_ECHO_REPLY, 1)
	}
}

// refusal is the ICMP error that the VIP sends about a packet.
func refusal(about ipPacket, kind4, code4, kind6 byte, number uint32) []byte {
	quote := about.bytes()
	quote = quote[:min(len(quote)&^1, 128)]
	kind, code := kind4, code4
	if about.src.Is6() {
		kind, code = kind6, 0
	}
	out := ipPacket{src: about.dst, dst: about.src, proto: icmpProto(about.src), ttl: 64,
		payload: icmpMessage(about.dst, about.src, kind, code, number, quote)}
	return ether(routerMAC, ownMAC, out.bytes(), 5)
}

func TestTimeExceeded(t *testing.T) {
	for _, p := range paths {
		n, _ := p.one(t, nil, ingress, 1500, 0)
		for _, size := range []int{0, 3, 1000} {
			in := p.packet("udp", make([]byte, size))
			in.ttl = 1
			n.expect(fromRouter(in, 5), xdpTX, refusal(in, 11, 0, 3, 0))
		}
		n.expectEvent(bpfEventEVENT_TIME_EXCEEDED, 3)
	}
}

// The MTU told is what fits the tunnel, to the byte; also without DF.
func TestTooBig(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n, number := p.one(t, nil, ingress, 1500, 0)
			in := p.packet("tcp", nil)
			in.frag = 0
			room := 1500 - (len(p.wrapped(in, 0, number).bytes()) - len(in.bytes()))
			data := room - len(in.bytes())
			fits, large := p.packet("tcp", make([]byte, data)), p.packet("tcp", make([]byte, data+1))
			large.frag = 0
			n.expect(fromRouter(fits), xdpTX, ether(workerMAC, ownMAC, p.wrapped(fits, p.hash(protoTCP), number).bytes()))
			n.expect(fromRouter(large, 5), xdpTX, refusal(large, 3, 4, 2, uint32(room)))
			n.expectEvent(bpfEventEVENT_TOO_BIG, 1)
		})
	}
}

// complaint is a router's ICMP error about an answer of the VIP's.
func (p path) complaint(about ipPacket) ipPacket {
	router := netip.MustParseAddr("198.51.100.1")
	kind, code := byte(3), byte(4)
	if p.vip.Is6() {
		router, kind, code = netip.MustParseAddr("2001:db8:f::1"), 2, 0
	}
	return ipPacket{src: router, dst: p.vip, proto: icmpProto(p.vip), ttl: 9,
		payload: icmpMessage(router, p.vip, kind, code, 1280, about.bytes()[:len(about.bytes())-12])}
}

func (p path) answer() ipPacket {
	src, dst := netip.AddrPortFrom(p.vip, 80), netip.AddrPortFrom(p.client, 40000)
	return ipPacket{src: p.vip, dst: p.client, proto: protoTCP, ttl: 50, payload: tcpSegment(src, dst, tcpACK, nil)}
}

func TestICMPErrorFollowsItsFlow(t *testing.T) {
	for _, p := range paths {
		t.Run(p.name, func(t *testing.T) {
			n, number := p.one(t, nil, ingress, 1500, 0)
			in := p.complaint(p.answer())
			n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), number).bytes()))
			other := p.answer()
			other.src, other.dst = other.dst, other.src
			n.expectDrop(fromRouter(p.complaint(other)), bpfDropDROP_ICMP_UNRELATED)
			closed := p.answer()
			closed.payload[1] = 81
			n.expectDrop(fromRouter(p.complaint(closed)), bpfDropDROP_ICMP_UNRELATED)
			in.ttl = 1
			n.expectDrop(fromRouter(in), bpfDropDROP_TTL)
		})
	}
}

func TestDrops(t *testing.T) {
	for _, p := range []path{paths[0], paths[1]} {
		t.Run(p.name, func(t *testing.T) {
			n, number := p.one(t, nil, ingress, 1500, 0)
			whole := fromRouter(p.packet("tcp", []byte("data")))
			for _, cut := range []int{1, 4, 10, 20} {
				n.expectDrop(whole[:len(whole)-cut], bpfDropDROP_MALFORMED)
			}
			short := p.packet("tcp", nil)
			short.payload = short.payload[:19]
			n.expectDrop(fromRouter(short), bpfDropDROP_MALFORMED)
			elsewhere := p.packet("tcp", nil)
			elsewhere.payload[3] = 81
			n.expectDrop(fromRouter(elsewhere), bpfDropDROP_NO_SERVICE)
			gre := p.packet("tcp", nil)
			gre.proto = 47
			n.expectDrop(fromRouter(gre), bpfDropDROP_PROTOCOL)
			n.setState(number, bpfBackendStateBACKEND_ACTIVE, 0)
			n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_NO_NEXT_HOP)
			n.setState(number, bpfBackendStateBACKEND_GONE, 1)
			n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_NO_BACKEND)
			n.service(p.vip, 82, protoTCP)
			empty := p.packet("tcp", nil)
			empty.payload[3] = 82
			n.expectDrop(fromRouter(empty), bpfDropDROP_NO_BACKEND)
		})
	}
}

// Nobody is told about a packet from a group, or from nobody.
func TestDropsWithoutReply(t *testing.T) {
	for _, source := range []string{"224.0.0.1", "0.0.0.0", "127.0.0.1", "255.255.255.255"} {
		p := paths[0]
		p.client = netip.MustParseAddr(source)
		n, _ := p.one(t, nil, ingress, 1500, 0)
		n.expectDrop(fromRouter(p.packet("tcp", make([]byte, 1450))), bpfDropDROP_TOO_BIG)
		last := p.packet("tcp", nil)
		last.ttl = 1
		n.expectDrop(fromRouter(last), bpfDropDROP_TTL)
	}
}

// A driver that leaves no room: a program before ours has used it up.
func TestDropHeadroom(t *testing.T) {
	p := paths[0]
	n, _ := p.one(t, nil, ingress, 1500, 0)
	programs, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer programs.Close()
	const used, size = 208, 64
	move := func(fn asm.BuiltinFunc, at int32) asm.Instructions {
		return asm.Instructions{asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, at), asm.Mov.Reg(asm.R3, asm.R10),
			asm.Add.Imm(asm.R3, -size), asm.Mov.Imm(asm.R4, size), fn.Call()}
	}
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R2, -used), asm.FnXdpAdjustHead.Call()}
	code = append(code, move(asm.FnXdpLoadBytes, used)...)
	code = append(code, move(asm.FnXdpStoreBytes, 0)...)
	code = append(code, asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, programs.FD()), asm.Mov.Imm(asm.R3, 0),
		asm.FnTailCall.Call(), asm.Mov.Imm(asm.R0, 0), asm.Return())
	before, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, AttachType: ebpf.AttachXDP, Instructions: code, License: "GPL", Flags: 1 << 5})
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	n.put(programs, uint32(0), n.FairleadXdp)
	frame := append(fromRouter(p.packet("tcp", nil)), make([]byte, 10)...)
	if action, _ := n.runBy(before, frame); action != xdpDrop {
		t.Errorf("action %d", action)
	}
	if got := noteDrops(t, n.Drops)[bpfDropDROP_HEADROOM]; got != 1 {
		t.Errorf("drops[headroom] = %d, want 1", got)
	}
}

// Tracing decides alike, records nothing, and says what was decided.
func TestTracing(t *testing.T) {
	p := paths[3]
	n, number := p.one(t, func(c *bpfConfig) { c.Tracing = 1 }, ingress, 1500, 0)
	in := p.packet("syn", nil)
	hash := p.hash(protoTCP)
	n.expect(fromRouter(in), xdpTX, ether(workerMAC, ownMAC, p.wrapped(in, hash, number).bytes()))
	var got bpfTrace
	if err := n.Traces.Lookup(uint32(0), &got); err != nil {
		t.Fatal(err)
	}
	want := bpfTrace{Src: wireAddr(p.client), Dst: wireAddr(p.vip), SrcPort: wirePort(40000), DstPort: wirePort(80),
		Proto: protoTCP, Family: 4, Flags: uint8(bpfPacketFlagPACKET_SYN), Service: 1, Slot: uint32(hash >> 56), Hash: hash,
		SlotWord: uint64(number), Backend: number, NextHop: 1, Ifindex: ingress, Verdict: uint16(bpfVerdictVERDICT_FORWARD), Verb: uint8(bpfVerbVERB_DELIVER), Attempt: 0x40,
		Steps: uint8(bpfTraceStepTRACE_PARSED | bpfTraceStepTRACE_SERVICE | bpfTraceStepTRACE_SLOT |
			bpfTraceStepTRACE_BACKEND | bpfTraceStepTRACE_NEXT_HOP)}
	if got != want {
		t.Errorf("trace\n%+v, want\n%+v", got, want)
	}
	if c := n.counter(n.ServiceCounters, 1); c != (bpfCounter{}) {
		t.Errorf("counted %+v", c)
	}
	in.proto = 47
	n.expect(fromRouter(in), xdpDrop, nil)
	if drops := noteDrops(t, n.Drops); len(drops) > 0 {
		t.Errorf("counted %v", drops)
	}
}
