// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// later is a packet of another connection of the same client.
func (p path) later(kind string) ipPacket {
	in := p.packet(kind, nil)
	src, dst := netip.AddrPortFrom(p.client, 40001), netip.AddrPortFrom(p.vip, 80)
	if kind == "udp" {
		in.payload = udpDatagram(src, dst, nil)
	} else {
		in.payload = tcpSegment(src, dst, tcpSYN, nil)
	}
	return in
}

// asks turns the order in a tunnel packet into a question.
func (p path) asks(frame []byte) []byte {
	frame = slices.Clone(frame)
	at := 14 + 20 + 8 + 12
	if p.tunnel.Is6() {
		at += 20
	}
	frame[at+1], frame[at+2] = byte(bpfVerbVERB_ASK), 1
	return frame
}

// keep makes a Pod of the path's service keep its clients.
func (n *network) keep(target netip.AddrPort, proto uint8, front netip.AddrPort, d time.Duration) {
	n.t.Helper()
	pod := bpfPod{Count: 1}
	pod.Serves[0] = bpfVipPort{Vip: wireAddr(front.Addr()), Port: wirePort(front.Port()), Affinity: affinityCode(d)}
	n.put(n.Pods, bpfPodKey{Address: wireAddr(target.Addr()), Port: wirePort(target.Port()), Proto: proto}, pod)
}

// A client's new flows go to the Pod whose answers it has got, whichever Pod is
// named and though it is only asked; nobody else's do, and none when the Pod
// leaves or the time is over.
func TestAffinityOfAClient(t *testing.T) {
	for _, p := range paths[3:] {
		for _, kind := range []string{"syn", "udp"} {
			t.Run(p.name+"/"+kind, func(t *testing.T) {
				proto, front := uint8(protoTCP), netip.AddrPortFrom(p.vip, 80)
				if kind == "udp" {
					proto = protoUDP
				}
				other := netip.AddrPortFrom(p.pod.Next().Next(), podPort)
				n := newWorker(t)
				n.keep(p.target(), proto, front, time.Minute)
				n.keep(other, proto, front, time.Minute)
				question := p.asks(fromRouter(p.wrapped(p.later(kind), p.hash(proto), 1)))
				n.expect(question, xdpTX, denial(question))

				// A confirmed flow of the other Pod, and an answer.
				n.put(n.Flows, p.flowKey(proto), bpfFlow{Pod: wireAddr(other.Addr()), PodPort: wirePort(other.Port()), Affinity: affinityCode(time.Minute),
					State: uint8(bpfFlowStateFLOW_ESTABLISHED), Seen: uint64(coarseClock(t)), Hash: 77, Fins: uint8(bpfFlowFinFLOW_ARMED)})
				n.runBy(n.FairleadEgress, ether(routerMAC, ownMAC, p.answerFrom(other, proto, tcpACK, nil).bytes()))
				var kept bpfAffinity
				key := p.flowKey(proto)
				key.ClientPort = 0
				if err := n.Affinities.Lookup(key, &kept); err != nil || kept.Pod != wireAddr(other.Addr()) || kept.Hash != 77 {
					t.Fatalf("%+v, %v", kept, err)
				}
				followed := fromRouter(p.wrapped(p.later(kind), p.hash(proto), 1))
				if kind == "syn" {
					followed = p.asks(followed) // a datagram may be another node's flow's
				}
				_, out := n.run(followed)
				if dst, err := destination(out); err != nil || dst != other.Addr() {
					t.Errorf("delivered to %s, %v", dst, err)
				}
				n.expectEvent(bpfEventEVENT_AFFINITY, 1)

				stranger := p.later(kind)
				stranger.src = stranger.src.Next()
				asked := p.asks(fromRouter(p.wrapped(stranger, p.hash(proto), 1)))
				n.expect(asked, xdpTX, denial(asked))

				// Leaving, and over.
				third := p.later(kind)
				third.payload[1]++
				asked = p.asks(fromRouter(p.wrapped(third, p.hash(proto), 1)))
				n.keep(other, proto, front, 0)
				n.expect(asked, xdpTX, denial(asked))
				n.keep(other, proto, front, time.Minute)
				kept.Seen -= uint64(61 * time.Second)
				n.put(n.Affinities, key, kept)
				n.expect(asked, xdpTX, denial(asked))
			})
		}
	}
}

// Seconds survive the way into 16 bits: exactly up to nine hours, and by four
// seconds above.
func TestAffinityCode(t *testing.T) {
	for _, seconds := range []int{1, 2, 10800, 32767, 32768, 32769, 86399, 86400} {
		d := time.Duration(seconds) * time.Second
		got := lasts(affinityCode(d))
		if got < d || got > d+3*time.Second || seconds < affinityCoarse && got != d {
			t.Errorf("%s becomes %s", d, got)
		}
	}
}

// In a contested slot of a service with affinity a SYN is a question; when
// nobody has the client, it is the slot's backend's at once.
func TestAskAboutAClient(t *testing.T) {
	for _, p := range paths[3:] {
		t.Run(p.name, func(t *testing.T) {
			c := newContest(t, p)
			c.flag(1, bpfServiceFlagSERVICE_AFFINITY)
			in := p.packet("syn", nil)
			sent := func(to int, verb bpfVerb, attempt byte) []byte {
				p := p
				p.tunnel = c.workers[to]
				hash := testKey.Hash(p.client, p.vip, 0, 80, protoTCP)
				frame := ether(workerMAC, ownMAC, p.wrapped(in, hash, c.numbers[to]).bytes())
				at := 14 + 20 + 8 + 12
				if p.tunnel.Is6() {
					at += 20
				}
				frame[at+1], frame[at+2] = byte(verb), attempt
				return frame
			}
			c.expect(fromRouter(in), xdpTX, sent(0, bpfVerbVERB_ASK, 1))
			c.expect(denial(sent(0, bpfVerbVERB_ASK, 1)), xdpTX, sent(1, bpfVerbVERB_ASK, 2))
			c.expect(denial(sent(1, bpfVerbVERB_ASK, 2)), xdpTX, sent(2, bpfVerbVERB_ASK, 3))
			c.expect(denial(sent(2, bpfVerbVERB_ASK, 3)), xdpTX, sent(0, bpfVerbVERB_DELIVER, 0x40))
			c.expectEvent(bpfEventEVENT_TAKEN, 1)

			// A backend that takes no new flows is not asked about clients.
			c.setState(c.numbers[1], bpfBackendStateBACKEND_DRAINING, 1)
			c.put(c.Hints, p.hash(protoTCP), bpfHint{Backend: c.numbers[1], Generation: testGeneration})
			c.expect(denial(sent(0, bpfVerbVERB_ASK, 1)), xdpTX, sent(2, bpfVerbVERB_ASK, 3))
		})
	}
}
