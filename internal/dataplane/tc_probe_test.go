// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

// prober is an LB node's uplink with fairlead_probe on it, and what comes out
// of it.
type prober struct {
	*network
	ns    *testnet.Namespace
	sniff int
	mac   [6]byte // of the router
	own   [6]byte
}

func newProber(t *testing.T) *prober {
	t.Helper()
	need.Root(t)
	outside := []netip.Prefix{netip.MustParsePrefix("10.0.0.254/24"), netip.MustParsePrefix("fd00::254/64")}
	pair, err := testnet.NewPair(outside, []netip.Prefix{netip.PrefixFrom(node4, 24), netip.PrefixFrom(node6, 64)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pair.Close)
	p := &prober{network: newNetwork(t, nil), ns: pair.Inside}
	theirs, err := pair.Outside.MAC()
	must(t, err)
	ours, err := pair.Inside.MAC()
	must(t, err)
	p.mac, p.own = [6]byte(theirs), [6]byte(ours)
	for i, everything := range []string{"0.0.0.0/0", "::/0"} {
		must(t, pair.Inside.SetNeighbour(outside[i].Addr(), theirs))
		must(t, pair.Inside.SetRoute(testnet.Route{To: netip.MustParsePrefix(everything), Via: []netip.Addr{outside[i].Addr()}}))
	}
	for _, a := range []netip.Addr{worker4, worker6} {
		must(t, pair.Inside.SetNeighbour(a, workerMAC[:]))
	}
	index, err := pair.Inside.Device(testnet.Uplink)
	must(t, err)
	must(t, pair.Inside.Do(func() error {
		l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: p.FairleadProbe, Attach: ebpf.AttachTCXEgress})
		if err == nil {
			t.Cleanup(func() { l.Close() })
		}
		return err
	}))
	must(t, pair.Outside.Do(func() (err error) {
		p.sniff, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap16(unix.ETH_P_ALL)))
		if err == nil {
			err = unix.SetsockoptTimeval(p.sniff, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000})
		}
		return err
	}))
	t.Cleanup(func() { unix.Close(p.sniff) })
	return p
}

// send sends a datagram to the VIP by a socket that is bound to a backend, and
// returns the frame that left; nil: none did.
func (p *prober) send(to netip.AddrPort, probe bpfProbe) []byte {
	p.t.Helper()
	must(p.t, p.ns.Do(func() error {
		family, address := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
		if to.Addr().Is4() {
			address.(*unix.SockaddrInet4).Addr = to.Addr().As4()
		} else {
			family, address = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
		if err != nil {
			return err
		}
		if probe.Backend != 0 {
			if err := p.Probes.Put(cookie, probe); err != nil {
				return err
			}
		}
		return unix.Sendto(fd, []byte("ping"), 0, address)
	}))
	frame := make([]byte, 2048)
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); {
		n, _, err := unix.Recvfrom(p.sniff, frame, 0)
		if err != nil {
			return nil
		}
		if kind := binary.BigEndian.Uint16(frame[12:]); (kind == etherIPv4 || kind == etherIPv6) && bytes.Contains(frame[:n], []byte("ping")) {
			return frame[:n]
		}
	}
	return nil
}

// A probe's packet goes through the tunnel to the one backend, once, at the port
// that is probed, with the hash 0 and an attempt that says so; in mode L2 in a
// frame to the server.
func TestProbe(t *testing.T) {
	for _, path := range append(paths, l2Paths...) {
		t.Run(path.name, func(t *testing.T) {
			p := newProber(t)
			number := p.backend(path.mode, netip.AddrPortFrom(path.pod, podPort), path.tunnel, 0)
			to := netip.AddrPortFrom(path.vip, 80)
			frame := p.send(to, bpfProbe{Backend: number, Generation: testGeneration, Port: wirePort(9090)})
			if frame == nil {
				t.Fatalf("nothing left; drops %v", noteDrops(t, p.Drops))
			}
			outer, err := network3(frame)
			must(t, err)
			inner := outer
			if path.mode != bpfModeMODE_L2 {
				at := 20
				if path.tunnel.Is6() {
					at = 40
				}
				if dst, _ := destination(frame); dst != path.tunnel {
					t.Errorf("sent to %s", dst)
				}
				if path.mode == bpfModeMODE_GENEVE {
					option := outer[at+8+12:]
					if binary.BigEndian.Uint16(outer[at+2:]) != genevePort || option[1] != byte(bpfVerbVERB_DELIVER) || option[2] != 0x80 ||
						binary.BigEndian.Uint16(option[4:]) != 9090 || binary.BigEndian.Uint64(option[24:]) != 0 || !bytes.Equal(option[16:24], testTag[:]) {
						t.Errorf("option\n%s", hex.Dump(option[:32]))
					}
					at += 8 + 12 + 32 + int(option[3])
				}
				inner = outer[at:]
			} else if [6]byte(frame) != workerMAC || [6]byte(frame[6:]) != p.own {
				t.Errorf("frame to % x from % x", frame[:6], frame[6:12])
			}
			dst := netip.Addr{}
			if inner[0]>>4 == 4 {
				dst = netip.AddrFrom4([4]byte(inner[16:20]))
			} else {
				dst = netip.AddrFrom16([16]byte(inner[24:40]))
			}
			if dst != path.vip {
				t.Errorf("what is in it goes to %s", dst)
			}
			p.expectEvent(bpfEventEVENT_PROBE, 1)
		})
	}
}

// What no probe sends is untouched, and a probe of a backend that has been
// replaced is dropped: it would be balanced, and say nothing.
func TestProbeOfNobody(t *testing.T) {
	p := newProber(t)
	number := p.backend(bpfModeMODE_GENEVE, netip.AddrPortFrom(pod4, podPort), worker4, 0)
	to := netip.AddrPortFrom(vip4, 80)
	frame := p.send(to, bpfProbe{})
	if dst, err := destination(frame); err != nil || dst != vip4 || [6]byte(frame) != p.mac {
		t.Errorf("%v: % x", err, frame)
	}
	if frame := p.send(to, bpfProbe{Backend: number, Generation: testGeneration + 1}); frame != nil {
		t.Errorf("a probe of a backend that was replaced left:\n%s", hex.Dump(frame))
	}
	if noteDrops(t, p.Drops)[bpfDropDROP_PROBE] != 1 {
		t.Error("it was not counted")
	}
	p.expectEvent(bpfEventEVENT_PROBE, 0)
}

// Who says that a tunnel's end cannot be reached makes it suspect; a packet that
// was only too big, or was none of ours, does not.
func TestUnreachable(t *testing.T) {
	for _, p := range paths {
		n := newNetwork(t, nil)
		said := func() (all []netip.Addr) {
			each(t, n.bpfObjects.Unreachable, func(a bpfAddr, _ uint64) { all = append(all, addrOf(a)) })
			return all
		}
		report := func(kind, code byte, from netip.Addr) []byte {
			quoted := p.wrapped(p.packet("tcp", nil), 1, 1)
			quoted.src = from
			proto := byte(protoICMP)
			if p.node.Is6() {
				proto = protoICMPv6
			}
			router := client4
			if p.node.Is6() {
				router = client6
			}
			return fromRouter(ipPacket{src: router, dst: p.node, proto: proto, ttl: 60, payload: icmpMessage(router, p.node, kind, code, 0, quoted.bytes())})
		}
		unreachable, tooBig := byte(3), [2]byte{3, 4}
		if p.node.Is6() {
			unreachable, tooBig = 1, [2]byte{2, 0}
		}
		for _, frame := range [][]byte{report(tooBig[0], tooBig[1], p.node), report(unreachable, 1, p.node.Next())} {
			n.expect(frame, xdpPass, frame)
		}
		if all := said(); len(all) > 0 {
			t.Errorf("%s: %v", p.name, all)
		}
		frame := report(unreachable, 1, p.node)
		n.expect(frame, xdpPass, frame)
		if all := said(); len(all) != 1 || all[0] != p.tunnel {
			t.Errorf("%s: %v", p.name, all)
		}
	}
}
