// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"

	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/model"
)

// newBothRoles is a node with both roles: services on workers by both modes,
// and Pods of its own.
func newBothRoles(t testing.TB) *network {
	t.Helper()
	n := newNetwork(t, func(c *bpfConfig) {
		c.Backend, c.Tag = 1, testTag
		c.IdleTcpNs, c.IdleUdpNs, c.IdleClosingNs = 3600e9, 3600e9, 3600e9
	})
	row := n.hop(ingress, 1500, 0)
	for _, family := range []struct{ vip, pod, worker netip.Addr }{{vip4, pod4, worker4}, {vip6, pod6, worker6}} {
		geneve := n.backend(bpfModeMODE_GENEVE, netip.AddrPortFrom(family.pod, podPort), family.worker, row)
		ipip := n.backend(bpfModeMODE_IPIP, netip.AddrPortFrom(family.worker, 80), family.worker, row)
		local := netip.AddrPortFrom(family.pod.Next(), podPort)
		here := n.backend(bpfModeMODE_LOCAL, local, netip.IPv4Unspecified(), 0)
		gone := n.backend(bpfModeMODE_IPIP, netip.AddrPortFrom(family.worker.Next(), 80), family.worker.Next(), row)
		n.setState(gone, bpfBackendStateBACKEND_GONE, row)
		for _, proto := range []uint8{protoTCP, protoUDP} {
			n.service(family.vip, 80, proto, geneve, ipip, here, gone)
			n.pod(local, proto, netip.AddrPortFrom(family.vip, 80))
			n.pod(netip.AddrPortFrom(family.pod, podPort), proto, netip.AddrPortFrom(family.vip, 80))
		}
	}
	// Two slots of three are contested, by others' candidates too.
	n.put(n.Candidates, uint32(1), bpfCandidateRow{Number: [7]uint32{1, 3, 5, 7}})
	n.put(n.Candidates, uint32(2), bpfCandidateRow{Number: [7]uint32{4, 8, 7, 3, 2, 6, 1}})
	for slot := range n.slots {
		var word uint64
		if err := n.bpfObjects.Slots.Lookup(slot, &word); err != nil {
			t.Fatal(err)
		}
		n.put(n.bpfObjects.Slots, slot, word|uint64(slot%3)<<32)
	}
	for _, p := range []netip.Prefix{netip.PrefixFrom(worker4, 32), netip.PrefixFrom(worker6, 128)} {
		n.put(n.LbNodes, lbNodeKey(p), uint32(0)) // another LB node sends from there
	}
	return n
}

// seeds are frames of every kind, to be mutilated.
func seeds() [][]byte {
	var all [][]byte
	for _, p := range paths {
		for i, kind := range []string{"tcp", "syn", "udp", "tcp", "tcp", "udp", "udp", "tcp", "syn"} {
			inner := p.packet(kind, []byte("some data"))
			binary.BigEndian.PutUint16(inner.payload, 40000+uint16(i)) // another flow
			all = append(all, fromRouter(inner), fromRouter(inner, 5), fromRouter(inner, 5, 6))
			if p.mode == bpfModeMODE_GENEVE {
				all = append(all, p.bounces(inner)...)
			}
			outer := p.wrapped(inner, p.hash(inner.proto), 1)
			outer.src, outer.dst = p.tunnel, p.node
			all = append(all, fromRouter(outer))
			if p.vip.Is6() {
				all = append(all, extended(fromRouter(inner), 2), extended(fromRouter(inner), 7))
			}
			fragment := inner
			fragment.frag = 0x2000
			all = append(all, fromRouter(fragment))
		}
		all = append(all, fromRouter(p.complaint(p.answer())))
		request := byte(8)
		if p.vip.Is6() {
			request = 128
		}
		all = append(all, fromRouter(ipPacket{src: p.client, dst: p.vip, proto: icmpProto(p.vip), ttl: 9,
			payload: icmpMessage(p.client, p.vip, request, 0, 1, []byte("ping"))}))
	}
	return all
}

// bounces are what a worker could send back of a packet, for each attempt.
func (p path) bounces(inner ipPacket) (all [][]byte) {
	number := uint32(1) // see newBothRoles
	if p.vip.Is6() {
		number = 5
	}
	for _, port := range []uint16{binary.BigEndian.Uint16(inner.payload), 0} { // 0: with affinity
		hash := testKey.Hash(p.client, p.vip, port, 80, inner.proto)
		for _, attempt := range []byte{0, 1, 2, 3, 8, 0x40, 0x41, 0x47, 0x48} {
			outer := p.wrapped(inner, hash, number)
			outer.src, outer.dst = p.tunnel, p.node
			option := outer.payload[8+12:]
			option[1], option[2] = byte(bpfVerbVERB_DENIED), attempt
			all = append(all, fromRouter(outer))
		}
	}
	return all
}

// extended puts extension headers into an IPv6 frame: hop-by-hop and
// destination options that say nothing.
func extended(frame []byte, count int) []byte {
	const at = 14 + 40
	var headers []byte
	for i := range count {
		next := byte(60)
		if i == count-1 {
			next = frame[14+6]
		}
		headers = append(headers, next, 0, 1, 4, 0, 0, 0, 0)
	}
	out := slices.Concat(frame[:at], headers, frame[at:])
	out[14+6] = 0
	binary.BigEndian.PutUint16(out[14+4:], binary.BigEndian.Uint16(frame[14+4:])+uint16(len(headers)))
	return out
}

// harmless says what is wrong with what the program made of a frame, if
// anything: it sends to known workers, as the VIP to whoever sent the frame,
// or hands to a Pod of this node; else it leaves the frame as it was.
func harmless(in, out []byte, action uint32) error {
	switch action {
	case xdpDrop:
		return nil
	case xdpPass:
		if bytes.Equal(in, out) {
			return nil
		}
		dst, err := destination(out)
		if err == nil && dst != pod4 && dst != pod6 && dst != pod4.Next() && dst != pod6.Next() {
			err = fmt.Errorf("delivered to %s", dst)
		}
		return err
	case xdpTX:
		dst, err := destination(out)
		if err != nil || dst == worker4 || dst == worker6 {
			return err
		}
		if (dst == vip4 || dst == vip6) && bytes.Equal(out[:12], append(workerMAC[:], ownMAC[:]...)) {
			return nil // as it came, in mode L2
		}
		src, err := source(out)
		if err == nil && (src != vip4 && src != vip6 || !bytes.Contains(in, dst.AsSlice())) {
			err = fmt.Errorf("sent from %s to %s", src, dst)
		}
		return err
	}
	return fmt.Errorf("action %d", action)
}

func network3(frame []byte) ([]byte, error) {
	for at := 12; at+2 <= len(frame); at += 4 {
		kind := binary.BigEndian.Uint16(frame[at:])
		if kind == etherVLAN || kind == etherQinQ {
			continue
		}
		packet := frame[at+2:]
		if kind == etherIPv4 && len(packet) >= 20 || kind == etherIPv6 && len(packet) >= 40 {
			return packet, nil
		}
		break
	}
	return nil, errors.New("what was made is no IP packet")
}

func destination(frame []byte) (netip.Addr, error) {
	packet, err := network3(frame)
	if err != nil {
		return netip.Addr{}, err
	}
	if packet[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(packet[16:20])), nil
	}
	return netip.AddrFrom16([16]byte(packet[24:40])), nil
}

func source(frame []byte) (netip.Addr, error) {
	packet, err := network3(frame)
	if err != nil {
		return netip.Addr{}, err
	}
	if packet[0]>>4 == 4 {
		return netip.AddrFrom4([4]byte(packet[12:16])), nil
	}
	return netip.AddrFrom16([16]byte(packet[8:24])), nil
}

// attack fails when what the program does with a frame is harmful, too.
func (w *twin) attack(t testing.TB, frame []byte) {
	t.Helper()
	decision, out := w.receive(t, frame)
	action := map[model.Verdict]uint32{model.Pass: xdpPass, model.Deliver: xdpPass, model.Drop: xdpDrop}[decision.Verdict]
	if action == 0 {
		action = xdpTX
	}
	if err := harmless(frame, out, action); err != nil {
		t.Fatalf("%v\nfrom\n%sto\n%s", err, hex.Dump(frame), hex.Dump(out))
	}
}

// Frames that are nearly right do no harm either. Most mutations are of a few
// bytes, so that they get far before something is noticed. The programs decide
// about each as the model does.
func TestMutilatedFrames(t *testing.T) {
	t.Run("plain", func(t *testing.T) { mutilate(t, newBothRoles(t), 300_000) })
	t.Run("gated, with affinity, L2", func(t *testing.T) { mutilate(t, newGated(t), 150_000) })
}

// newGated has services with affinity, and some of them for few clients; it is
// in mode L2 what the other is in IPIP.
func newGated(t testing.TB) *network {
	n := newBothRoles(t)
	for number := uint32(1); number < n.services; number++ {
		var word uint64
		if err := n.ServiceWords.Lookup(number, &word); err != nil {
			t.Fatal(err)
		}
		flags := bpfServiceFlagSERVICE_AFFINITY
		if number%2 == 0 {
			flags |= bpfServiceFlagSERVICE_RANGES
			for _, text := range []string{"203.0.113.8/30", "2001:db8:c::/64"} {
				n.put(n.SourceRanges, sourceKey(number, netip.MustParsePrefix(text)), uint32(1))
			}
		}
		n.put(n.ServiceWords, number, word|uint64(flags)<<serviceFlagsShift)
	}
	for number := uint32(1); number < n.backends; number++ {
		var row bpfBackend
		if err := n.bpfObjects.Backends.Lookup(number, &row); err != nil {
			t.Fatal(err)
		}
		if bpfMode(row.Mode) == bpfModeMODE_IPIP {
			row.Mode, row.OuterSum = uint8(bpfModeMODE_L2), 0
			n.put(n.bpfObjects.Backends, number, row)
		}
	}
	pods := map[bpfPodKey]bpfPod{}
	each(t, n.Pods, func(key bpfPodKey, pod bpfPod) { pods[key] = pod })
	for key, pod := range pods {
		pod.Serves[0].Affinity = affinityCode(time.Hour)
		n.put(n.Pods, key, pod)
	}
	return n
}

func mutilate(t *testing.T, n *network, rounds int) {
	w := newTwin(t, n)
	random := rand.New(rand.NewPCG(11, 12))
	all := seeds()
	for _, frame := range all {
		w.attack(t, frame)
	}
	for range rounds {
		frame := bytes.Clone(all[random.IntN(len(all))])
		for range 1 + random.IntN(4) {
			at := 12 + random.IntN(len(frame)-12)
			switch random.IntN(3) {
			case 0:
				frame[at] = byte(random.Uint32())
			case 1:
				frame[at] ^= 1 << random.IntN(8)
			case 2:
				frame[at] = []byte{0, 1, 0x7f, 0x80, 0xff}[random.IntN(5)]
			}
		}
		if random.IntN(4) == 0 {
			frame = frame[:14+random.IntN(len(frame)-13)]
		}
		w.attack(t, frame)
		if random.IntN(4) == 0 {
			w.answer(t, random)
		}
	}
	w.compareFlows(t)
	w.compareClients(t)
	if len(w.model.Flows.Confirmed) < 100 || len(w.model.Flows.Pending) < 100 {
		t.Errorf("%d flows confirmed, %d pending: too few to compare", len(w.model.Flows.Confirmed), len(w.model.Flows.Pending))
	}
	w.expectAll(t)
}

func FuzzPacket(f *testing.F) { fuzz(f, newBothRoles(f)) }

// FuzzGated is the same of services with affinity, ranges and mode L2.
func FuzzGated(f *testing.F) { fuzz(f, newGated(f)) }

func fuzz(f *testing.F, n *network) {
	w := newTwin(f, n)
	for _, frame := range seeds() {
		f.Add(frame)
	}
	f.Fuzz(func(t *testing.T, frame []byte) {
		if len(frame) < 14 || len(frame) > 3000 {
			return // no frame that the kernel's test run takes
		}
		w.attack(t, frame)
	})
}
