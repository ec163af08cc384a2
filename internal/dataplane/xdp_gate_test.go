// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

var l2Paths = []path{
	{"l2/4", bpfModeMODE_L2, client4, vip4, worker4, worker4, node4},
	{"l2/6", bpfModeMODE_L2, client6, vip6, worker6, worker6, node6},
}

// In mode L2 the packet stays as it is, but for one hop less.
func TestForwardL2(t *testing.T) {
	for _, p := range l2Paths {
		for _, tag := range []uint16{0, 9} {
			n, number := p.one(t, nil, ingress, 1500, tag)
			for _, kind := range []string{"tcp", "syn", "udp"} {
				in := p.packet(kind, []byte("some bytes"))
				out := in
				out.ttl--
				var tags []uint16
				if tag != 0 {
					tags = []uint16{tag}
				}
				n.expect(fromRouter(in, 5), xdpTX, ether(workerMAC, ownMAC, out.bytes(), tags...))
			}
			if got := n.counter(n.BackendCounters, number); got.Packets != 3 || got.Connections != 1 {
				t.Errorf("%s: backend counter %+v", p.name, got)
			}
		}
	}
}

// What fits the link fits; what does not is refused by its own size.
func TestForwardL2TooBig(t *testing.T) {
	for _, p := range l2Paths {
		n, _ := p.one(t, nil, ingress, 1400, 0)
		headers := len(p.packet("tcp", nil).bytes())
		fits := p.packet("tcp", make([]byte, 1400-headers))
		n.expect(fromRouter(fits), xdpTX, nil)
		n.expectEvent(bpfEventEVENT_TOO_BIG, 0)
		n.expect(fromRouter(p.packet("tcp", make([]byte, 1401-headers))), xdpTX, nil)
		n.expectEvent(bpfEventEVENT_TOO_BIG, 1)
	}
}

// Without a neighbour nothing is sent: a gateway would send it back.
func TestForwardL2NoNextHop(t *testing.T) {
	p := l2Paths[0]
	n := newNetwork(t, nil)
	n.service(p.vip, 80, protoTCP, n.backend(p.mode, netip.AddrPortFrom(p.pod, podPort), p.tunnel, 0))
	n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_NO_NEXT_HOP)
}

// flag gives a service flags beside those that it has.
func (n *network) flag(service uint32, flags bpfServiceFlag) {
	n.t.Helper()
	var word uint64
	if err := n.ServiceWords.Lookup(service, &word); err != nil {
		n.t.Fatal(err)
	}
	n.put(n.ServiceWords, service, word|uint64(flags)<<serviceFlagsShift)
}

// Only clients in the ranges come in; the ranges of one service are nobody
// else's.
func TestSourceRanges(t *testing.T) {
	for _, p := range []path{paths[3], paths[4]} {
		for _, c := range []struct {
			ranges []string
			open   bool
		}{
			{nil, false}, {[]string{"0.0.0.0/0", "::/0"}, true}, {[]string{"203.0.113.0/24", "2001:db8:c::/48"}, true},
			{[]string{"203.0.113.8/32", "2001:db8:c::8/128"}, false}, {[]string{"203.0.113.9/32", "2001:db8:c::9/128"}, true},
			{[]string{"203.0.113.128/25", "2001:db8:d::/48"}, false},
		} {
			n, _ := p.one(t, nil, ingress, 1500, 0)
			n.flag(1, bpfServiceFlagSERVICE_RANGES)
			for _, text := range c.ranges {
				n.put(n.SourceRanges, sourceKey(1, netip.MustParsePrefix(text)), uint32(1))
			}
			n.put(n.SourceRanges, sourceKey(2, netip.MustParsePrefix("0.0.0.0/0")), uint32(1))
			n.put(n.SourceRanges, sourceKey(2, netip.MustParsePrefix("::/0")), uint32(1))
			if c.open {
				n.expect(fromRouter(p.packet("tcp", nil)), xdpTX, nil)
			} else {
				n.expectDrop(fromRouter(p.packet("tcp", nil)), bpfDropDROP_SOURCE_RANGE)
			}
			n.expect(fromRouter(p.packet("udp", nil)), xdpTX, nil) // another service
		}
	}
}

// limited is a network whose TCP service has these limits.
func limited(t testing.TB, p path, limits lb.Limits) *network {
	t.Helper()
	n, _ := p.one(t, nil, ingress, 1500, 0)
	n.flag(1, bpfServiceFlagSERVICE_LIMITS)
	n.put(n.ServiceLimits, uint32(1), bpfServiceLimit{All: ratesOf(limits.All), Client: ratesOf(limits.PerClient)})
	return n
}

// passes sends a packet so often, and returns how often it came through.
func (n *network) passes(frame []byte, times int) (passed int) {
	n.t.Helper()
	for range times {
		if action, _ := n.run(frame); action == xdpTX {
			passed++
		}
	}
	return passed
}

// Each kind of limit lets a burst of a tenth of a second through, and counts
// the rest as limited. Rates are so low that no token comes back meanwhile.
func TestLimits(t *testing.T) {
	for _, p := range []path{paths[3], paths[4]} {
		tcp, syn := fromRouter(p.packet("tcp", nil)), fromRouter(p.packet("syn", nil))
		length := uint64(len(p.packet("tcp", nil).bytes()))
		for _, c := range []struct {
			name       string
			rate       lb.Rate
			frame      []byte
			least      int
			unaffected []byte
		}{
			{"connections", lb.Rate{Connections: 1}, syn, 1, tcp},
			{"packets", lb.Rate{Packets: 50}, tcp, 5, nil},
			{"bits", lb.Rate{Bits: 64000}, tcp, int(largestPacket / length), nil},
		} {
			for _, client := range []bool{false, true} {
				limits, reason := lb.Limits{All: c.rate}, bpfDropDROP_LIMIT_SERVICE
				if client {
					limits, reason = lb.Limits{PerClient: c.rate}, bpfDropDROP_LIMIT_CLIENT
				}
				n := limited(t, p, limits)
				began := time.Now()
				passed := n.passes(c.frame, 3*c.least+5)
				most := c.least + int(time.Since(began).Seconds()*float64(max(c.rate.Connections, c.rate.Packets, c.rate.Bits/8/length)))
				if passed < c.least || passed > most+1 {
					t.Errorf("%s %s, by client %v: %d passed, want %d to %d", p.name, c.name, client, passed, c.least, most+1)
				}
				if dropped := noteDrops(t, n.Drops)[reason]; dropped != uint64(3*c.least+5-passed) {
					t.Errorf("%s %s, by client %v: %d passed, %d of %d were counted", p.name, c.name, client, passed, dropped, 3*c.least+5)
				}
				if c.unaffected != nil {
					n.expect(c.unaffected, xdpTX, nil)
				}
				n.expect(fromRouter(p.packet("udp", nil)), xdpTX, nil)
				other := p.packet("tcp", nil)
				if c.name == "connections" {
					other = p.packet("syn", nil)
				}
				if other.src = netip.MustParseAddr("198.51.100.1"); p.vip.Is6() {
					other.src = netip.MustParseAddr("2001:db8:e::1")
				}
				// Another client has a bucket of its own, but shares the service's.
				if got := n.passes(fromRouter(other), c.least); client && got != c.least || !client && got > c.least/2+1 {
					t.Errorf("%s %s, by client %v: %d of %d of another client passed", p.name, c.name, client, got, c.least)
				}
			}
		}
	}
}

// Addresses of one IPv6 /64 are one client.
func TestLimitsOfAPrefix(t *testing.T) {
	p := paths[4]
	n := limited(t, p, lb.Limits{PerClient: lb.Rate{Connections: 1}})
	n.expect(fromRouter(p.packet("syn", nil)), xdpTX, nil)
	other := p.packet("syn", nil)
	other.src = netip.MustParseAddr("2001:db8:c::1234:5678")
	n.expectDrop(fromRouter(other), bpfDropDROP_LIMIT_CLIENT)
}

// A bucket whose time is out of all bounds, as after the clock came around or
// the limit was lowered, is a full one.
func TestLimitForgetsNonsense(t *testing.T) {
	p := paths[3]
	for _, until := range []uint64{1, 1 << 63, ^uint64(0)} {
		n := limited(t, p, lb.Limits{All: lb.Rate{Packets: 50}})
		limit := bpfServiceLimit{All: ratesOf(lb.Rate{Packets: 50})}
		limit.Bucket.Until[bpfRateKindRATE_PACKETS] = until
		n.put(n.ServiceLimits, uint32(1), limit)
		if passed := n.passes(fromRouter(p.packet("tcp", nil)), 5); passed != 5 {
			t.Errorf("until %#x: %d of 5 passed", until, passed)
		}
	}
}
