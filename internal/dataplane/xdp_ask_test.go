// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"testing"
	"time"
)

// contest is an LB node with one service whose slots are all contested: the
// slots' own backend, and two candidates, each on a worker of its own.
type contest struct {
	*network
	path
	numbers []uint32 // the slots' own, then the candidates
	workers []netip.Addr
}

func newContest(t *testing.T, p path) *contest {
	t.Helper()
	c := &contest{network: newNetwork(t, nil), path: p}
	row := c.hop(ingress, 1500, 0)
	for i := range 3 {
		worker := p.tunnel
		for range i {
			worker = worker.Next()
		}
		c.workers = append(c.workers, worker)
		c.numbers = append(c.numbers, c.backend(p.mode, netip.AddrPortFrom(p.pod, podPort), worker, row))
	}
	c.put(c.Candidates, uint32(9), bpfCandidateRow{Number: [7]uint32{c.numbers[1], c.numbers[2]}})
	for _, proto := range []uint8{protoTCP, protoUDP} {
		c.service(p.vip, 80, proto, c.numbers[0])
	}
	for slot := range c.slots {
		c.put(c.bpfObjects.Slots, slot, uint64(9)<<32|uint64(c.numbers[0]))
	}
	return c
}

// sent is the frame that carries a packet to one of the backends.
func (c *contest) sent(in ipPacket, to int, verb bpfVerb, attempt byte) []byte {
	p := c.path
	p.tunnel = c.workers[to]
	frame := ether(workerMAC, ownMAC, p.wrapped(in, p.hash(in.proto), c.numbers[to]).bytes())
	at := 14 + 20 + 8 + 12
	if p.tunnel.Is6() {
		at += 20
	}
	frame[at+1], frame[at+2] = byte(verb), attempt
	return frame
}

// denied is the same frame as the backend's node sends it back.
func (c *contest) denied(in ipPacket, by int, attempt byte) []byte {
	return denial(c.sent(in, by, bpfVerbVERB_ASK, attempt))
}

func (c *contest) hint(proto uint8) uint32 {
	var hint bpfHint
	if c.Hints.Lookup(c.hash(proto), &hint) != nil {
		return 0
	}
	return hint.Backend
}

// Each candidate is asked in turn; the next packet goes to the last one at once.
func TestAskInTurn(t *testing.T) {
	for _, p := range paths[3:] {
		for _, kind := range []string{"tcp", "udp"} {
			t.Run(p.name+"/"+kind, func(t *testing.T) {
				c := newContest(t, p)
				in := p.packet(kind, []byte("data"))
				c.expect(fromRouter(in), xdpTX, c.sent(in, 0, bpfVerbVERB_ASK, 1))
				c.expect(c.denied(in, 0, 1), xdpTX, c.sent(in, 1, bpfVerbVERB_ASK, 2))
				c.expect(c.denied(in, 1, 2), xdpTX, c.sent(in, 2, bpfVerbVERB_ASK, 3))
				if got := c.hint(in.proto); got != c.numbers[2] {
					t.Errorf("the hint is %d, want %d", got, c.numbers[2])
				}
				c.expect(fromRouter(in), xdpTX, c.sent(in, 2, bpfVerbVERB_ASK, 0))
				c.expectEvent(bpfEventEVENT_BOUNCE, 2)
				c.expectEvent(bpfEventEVENT_HINT, 1)

				// A hint that is wrong costs a detour and is forgotten.
				c.expect(c.denied(in, 2, 0), xdpTX, c.sent(in, 0, bpfVerbVERB_ASK, 1))
				if got := c.hint(in.proto); got != 0 {
					t.Errorf("the hint is %d, want none", got)
				}
			})
		}
	}
}

// A SYN goes to the slot's own backend, and so do datagrams that stand alone.
func TestOrdersInAContest(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	in := p.packet("syn", nil)
	c.put(c.Hints, p.hash(protoTCP), bpfHint{Backend: c.numbers[1], Generation: testGeneration})
	c.expect(fromRouter(in), xdpTX, c.sent(in, 0, bpfVerbVERB_DELIVER, 0x40))
	if got := c.hint(protoTCP); got != 0 {
		t.Errorf("the hint is %d after a SYN", got)
	}
	var word uint64
	if err := c.ServiceWords.Lookup(uint32(2), &word); err != nil {
		t.Fatal(err)
	}
	c.put(c.ServiceWords, uint32(2), word|uint64(bpfServiceFlagSERVICE_INDEPENDENT)<<40)
	datagram := p.packet("udp", []byte("query"))
	c.expect(fromRouter(datagram), xdpTX, c.sent(datagram, 0, bpfVerbVERB_DELIVER, 0x40))
}

// Nobody has it: a UDP flow begins at the slot's backend; a TCP flow waits, for
// three seconds, until the owner may be known here.
func TestUnowned(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	datagram := p.packet("udp", nil)
	c.expect(c.denied(datagram, 2, 3), xdpTX, c.sent(datagram, 0, bpfVerbVERB_DELIVER, 0x40))
	if got := c.hint(protoUDP); got != c.numbers[0] {
		t.Errorf("the hint is %d, want %d", got, c.numbers[0])
	}
	c.expectEvent(bpfEventEVENT_TAKEN, 1)

	in, denied := p.packet("tcp", nil), c.denied(p.packet("tcp", nil), 2, 3)
	c.expectDrop(denied, bpfDropDROP_UNOWNED)
	c.expectDrop(denied, bpfDropDROP_UNOWNED)
	hash := p.hash(protoTCP)
	cell := func(age time.Duration, tag uint64) {
		c.put(c.Denials, uint32(hash&0xffff), uint64((coarseClock(t)-age).Milliseconds())<<16|tag)
	}
	tag := hash >> 16 & 0xffff
	cell(2500*time.Millisecond, tag)
	c.expectDrop(denied, bpfDropDROP_UNOWNED)
	cell(3100*time.Millisecond, tag)
	c.expect(denied, xdpTX, c.sent(in, 0, bpfVerbVERB_DELIVER, 0x40))
	cell(61*time.Second, tag) // that was another time
	c.expectDrop(denied, bpfDropDROP_UNOWNED)
	cell(3100*time.Millisecond, tag+1) // another flow's cell
	c.expectDrop(denied, bpfDropDROP_UNOWNED)
	var word uint64
	if err := c.Denials.Lookup(uint32(hash&0xffff), &word); err != nil || word&0xffff != (tag+1)&0xffff {
		t.Errorf("a fresh cell was taken from another flow: %#x, %v", word, err)
	}
}

// In a settled slot the slot's backend alone is asked, and the agent learns
// that somebody denied.
func TestDeniedWhereSettled(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	for slot := range c.slots {
		c.put(c.bpfObjects.Slots, slot, uint64(c.numbers[0]))
	}
	in := p.packet("tcp", nil)
	c.expect(fromRouter(in), xdpTX, c.sent(in, 0, bpfVerbVERB_ASK, 1))
	c.expectDrop(c.denied(in, 0, 1), bpfDropDROP_UNOWNED)
	var count uint64
	if err := c.ServiceDenials.Lookup(uint32(1), &count); err != nil || count != 1 {
		t.Errorf("%d denials counted, %v", count, err)
	}
	// An order to a Pod that its node does not know goes to the next slot's
	// backend, and on, but not for ever.
	syn := p.packet("syn", nil)
	bounce := denial(c.sent(syn, 0, bpfVerbVERB_DELIVER, 0x40))
	c.expect(bounce, xdpTX, c.sent(syn, 0, bpfVerbVERB_DELIVER, 0x41))
	c.expectDrop(denial(c.sent(syn, 0, bpfVerbVERB_DELIVER, 0x48)), bpfDropDROP_NO_BACKEND)
}

// Candidates that are gone are not asked; those that fail keep TCP alone.
func TestCandidatesThatCannotOwn(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	tcp, udp := p.packet("tcp", nil), p.packet("udp", nil)
	c.setState(c.numbers[1], bpfBackendStateBACKEND_GONE, 1)
	c.expect(c.denied(tcp, 0, 1), xdpTX, c.sent(tcp, 2, bpfVerbVERB_ASK, 3))
	c.setState(c.numbers[1], bpfBackendStateBACKEND_FAILING, 1)
	c.expect(c.denied(tcp, 0, 1), xdpTX, c.sent(tcp, 1, bpfVerbVERB_ASK, 2))
	c.expect(c.denied(udp, 0, 1), xdpTX, c.sent(udp, 2, bpfVerbVERB_ASK, 3))
}

// Nothing that did not come from a backend that can have been asked is believed.
func TestForgedBounces(t *testing.T) {
	for _, p := range paths[3:] {
		t.Run(p.name, func(t *testing.T) {
			c := newContest(t, p)
			stranger := c.backend(p.mode, netip.AddrPortFrom(p.pod, podPort), c.workers[2].Next(), 1)
			in := p.packet("tcp", nil)
			ip, option := 14, 14+20+8+12
			if p.tunnel.Is6() {
				option += 20
			}
			for name, edit := range map[string]func([]byte){
				"source":     func(f []byte) { f[option-8-12-1-4*b2i(p.tunnel.Is4())-16*b2i(p.tunnel.Is6())] ^= 0x10 },
				"tag":        func(f []byte) { f[option+16] ^= 1 },
				"hash":       func(f []byte) { f[option+31] ^= 1 },
				"generation": func(f []byte) { f[option+15] ^= 1 },
				"number":     func(f []byte) { f[option+11] = 0 },
				"port":       func(f []byte) { f[len(f)-20+1] ^= 1 }, // the client's
				"a node without a backend of the service": func(f []byte) {
					p := c.path
					p.tunnel = c.workers[2].Next()
					copy(f, denial(ether(workerMAC, ownMAC, p.wrapped(in, p.hash(protoTCP), stranger).bytes())))
				},
			} {
				t.Run(name, func(t *testing.T) {
					frame := c.denied(in, 1, 2)
					edit(frame)
					if p.tunnel.Is4() {
						frame[ip+10], frame[ip+11] = 0, 0
					}
					at := *c.network
					at.t = t
					at.expectDrop(frame, bpfDropDROP_TUNNEL_BOUNCE)
				})
			}
			if got := c.hint(protoTCP); got != 0 {
				t.Errorf("a forged bounce left the hint %d", got)
			}
		})
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Attempts beyond the first have a budget for each client prefix.
func TestBudget(t *testing.T) {
	p := paths[3]
	c := newContest(t, p)
	denied := c.denied(p.packet("tcp", nil), 0, 1)
	allowed, refused := 0, 0
	for range 20_000 { // within a second
		switch action, _ := c.run(denied); action {
		case xdpTX:
			allowed++
		default:
			refused++
		}
	}
	if drops := noteDrops(t, c.Drops)[bpfDropDROP_BUDGET]; refused == 0 || uint64(refused) != drops || allowed < 4096 {
		t.Errorf("%d allowed, %d refused, %d dropped for the budget", allowed, refused, drops)
	}
	// Another prefix has its own.
	other := c.path
	other.client = netip.MustParseAddr("203.0.114.9")
	c.path = other
	in := other.packet("tcp", nil)
	c.expect(c.denied(in, 0, 1), xdpTX, c.sent(in, 1, bpfVerbVERB_ASK, 2))
}
