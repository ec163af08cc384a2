// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/need"
)

const (
	benchFlows = 100_000
	benchTag   = 7 // of every worker, see benchBackend
)

// benchFlow is the client of the generator's flow of a number.
func benchFlow(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{172, byte(16 + n>>28), byte(n >> 20), byte(n >> 12)}), uint16(1024+n&0xfff))
}

// BenchmarkContested prints the cost of an established connection's packet at
// the LB node with this share of the slots contested, with a hint for each
// flow and without.
func BenchmarkContested(b *testing.B) {
	need.Root(b)
	for _, share := range []int{0, 1, 10, 100} {
		for _, hinted := range []bool{false, true} {
			b.Run(fmt.Sprintf("slots=%d%%/hinted=%t", share, hinted), func(b *testing.B) {
				objects := benchBalancer(b, bpfModeMODE_GENEVE)
				benchContest(b, objects, share)
				if hinted {
					benchHints(b, objects)
				}
				frame := benchFrame("tcp", 4, benchVIP[4])
				generator := benchGenerator(b, objects, frame, varyClient(frame, 4), benchFlows)
				generator.measure(b, frame, map[string]*ebpf.Program{"generator": generator.Nothing, "packet": objects.FairleadXdp})
			})
		}
	}
	b.Run("bounce", func(b *testing.B) {
		objects := benchBalancer(b, bpfModeMODE_GENEVE)
		benchContest(b, objects, 100)
		// From the backend that is the first candidate of every slot.
		frame := benchTunnel(3, 2, 1, netip.AddrFrom4([4]byte{10, 0, 1, 0}), benchNode)
		inner := uint32(14 + 20 + 8 + 12 + 36)
		generator := benchGenerator(b, objects, frame, vary{client: inner + 12, port: inner + 20, sum: headerSum(frame[inner:]), hash: 14 + 20 + 8 + 12 + 24}, benchFlows)
		generator.measure(b, frame, map[string]*ebpf.Program{"generator": generator.Nothing, "packet": objects.FairleadXdp})
	})
}

// benchContest makes a share of the slots contested by three candidates.
func benchContest(b *testing.B, objects *bpfObjects, share int) {
	b.Helper()
	if err := objects.Candidates.Put(uint32(1), bpfCandidateRow{Number: [7]uint32{1, 50, 99}}); err != nil {
		b.Fatal(err)
	}
	for slot := range uint32(1) << benchBits {
		if int(slot*2654435761>>8%100) < share {
			if err := objects.Slots.Put(slot, slotWord(2+slot%(benchBackends-1), 1)); err != nil {
				b.Fatal(err)
			}
		}
	}
}

func benchHints(b *testing.B, objects *bpfObjects) {
	b.Helper()
	key := benchKey()
	hashes, hints := make([]uint64, benchFlows), make([]bpfHint, benchFlows)
	for i := range hashes {
		client := benchFlow(i)
		hashes[i] = key.Hash(client.Addr(), benchVIP[4], client.Port(), benchPort, 6)
		hints[i] = bpfHint{Backend: 50, Generation: 1}
	}
	if _, err := objects.Hints.BatchUpdate(hashes, hints, nil); err != nil {
		b.Fatal(err)
	}
}

// benchTunnel is a tunnel packet of 136 bytes with an ACK of a client in it.
func benchTunnel(verb bpfVerb, attempt byte, backend uint32, src, dst netip.Addr) []byte {
	be := binary.BigEndian
	inner := benchFrame("tcp", 4, benchVIP[4])[14:54]
	b := be.AppendUint16(nil, 50000)
	b = be.AppendUint16(b, 6082)
	b = be.AppendUint16(b, uint16(8+8+4+32+4+len(inner)))
	b = append(b, 0, 0, 1+36/4, 0x40)
	b = be.AppendUint16(b, etherIPv4)
	b = be.AppendUint32(b, 1<<8)
	b = be.AppendUint16(b, 0xff4c)
	b = append(b, 0x81, 36/4, 1, byte(verb), attempt, 4)
	b = be.AppendUint16(b, podPort)
	b = append(b, 0, 0)
	b = be.AppendUint32(b, backend)
	b = be.AppendUint32(b, 1)
	b = append(b, benchTag, 0, 0, 0, 0, 0, 0, 0)
	b = append(b, make([]byte, 8)...)
	b = append(b, 10, 244, 0, byte(backend-1))
	outer := ipPacket{src: src, dst: dst, proto: protoUDP, ttl: 64, frag: 0x4000, payload: append(b, inner...)}
	frame := fromRouter(outer)
	return append(frame, make([]byte, 136-len(frame))...)
}

// BenchmarkWorker prints the cost of a packet of an established connection at
// the backend's node: a question that is taken, one that is denied, and the
// Pod's answer.
func BenchmarkWorker(b *testing.B) {
	need.Root(b)
	for _, flows := range []int{1000, 1_000_000} {
		for _, kind := range []string{"taken", "denied", "answer"} {
			b.Run(fmt.Sprintf("%s/flows=%d", kind, flows), func(b *testing.B) {
				objects := benchWorker(b, flows, kind != "denied")
				if kind == "answer" {
					frame := benchFrame("tcp", 4, netip.AddrFrom4([4]byte{172, 16, 0, 0}))
					copy(frame[14+12:], []byte{10, 244, 0, 0})
					copy(frame[14+16:], make([]byte, 4))
					binary.BigEndian.PutUint16(frame[14+20:], podPort)
					binary.BigEndian.PutUint16(frame[14+22:], 0)
					// The client is the destination here.
					generator := benchGenerator(b, objects, frame, vary{client: 14 + 16, port: 14 + 22}, flows)
					generator.measure(b, frame, map[string]*ebpf.Program{"generator": generator.NothingTC, "packet": objects.FairleadEgress})
					return
				}
				frame := benchTunnel(bpfVerbVERB_ASK, 1, 1, netip.MustParseAddr("10.0.0.77"), benchNode)
				inner := uint32(14 + 20 + 8 + 12 + 36)
				generator := benchGenerator(b, objects, frame, vary{client: inner + 12, port: inner + 20, sum: headerSum(frame[inner:])}, flows)
				generator.measure(b, frame, map[string]*ebpf.Program{"generator": generator.Nothing, "packet": objects.FairleadXdp})
			})
		}
	}
}

// benchWorker has one Pod, and as many flows to it as the generator makes.
func benchWorker(b *testing.B, flows int, filled bool) *bpfObjects {
	b.Helper()
	objects := benchLoad(b, map[string]int{"flows": flows + 1})
	pod := netip.AddrFrom4([4]byte{10, 244, 0, 0})
	put := func(m *ebpf.Map, key, value any) {
		if err := m.Put(key, value); err != nil {
			b.Fatal(err)
		}
	}
	serves := bpfPod{Count: 1}
	serves.Serves[0] = bpfVipPort{Vip: bpfAddrOf(benchVIP[4]), Port: swap16(benchPort)}
	put(objects.Pods, bpfPodKey{Address: bpfAddrOf(pod), Port: swap16(podPort), Proto: 6}, serves)
	put(objects.LbNodes, lbNodeKey(netip.MustParsePrefix("10.0.0.77/32")), uint32(0))
	if !filled {
		return objects
	}
	keys, values := make([]bpfFlowKey, flows), make([]bpfFlow, flows)
	for i := range keys {
		client := benchFlow(i)
		keys[i] = bpfFlowKey{Client: bpfAddrOf(client.Addr()), ClientPort: swap16(client.Port()), Vip: bpfAddrOf(benchVIP[4]), VipPort: swap16(benchPort), Proto: 6}
		values[i] = bpfFlow{Pod: bpfAddrOf(pod), PodPort: swap16(podPort), State: uint8(bpfFlowStateFLOW_ESTABLISHED),
			Fins: uint8(bpfFlowFinFLOW_ARMED), PodWindow: 60000}
	}
	if _, err := objects.Flows.BatchUpdate(keys, values, nil); err != nil {
		b.Fatal(err)
	}
	return objects
}
