// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/health"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/peer"
)

// Backends whose check fails take no new flows, or are gone where the check
// says so; when all fail, all stay, and that is told.
func TestWithHealth(t *testing.T) {
	id := func(last byte) lb.BackendID {
		return lb.BackendID{Target: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, 0, last}), 80), Mode: lb.ModeGeneve}
	}
	service := lb.ServiceID{Namespace: "d", Name: "s"}
	for _, c := range []struct {
		name   string
		reset  bool
		sick   []byte
		weight uint32 // of 10.1.0.3
		want   []string
		allOut bool
	}{
		{"all well", false, nil, 1, []string{"10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, false},
		{"one fails", false, []byte{2}, 1, []string{"10.1.0.1:80 active", "10.1.0.2:80 failing", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, false},
		{"one fails, and is reset", true, []byte{2}, 1, []string{"10.1.0.1:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, false},
		{"all fail", false, []byte{1, 2, 3}, 1, []string{"10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, true},
		{"all fail, and would be reset", true, []byte{1, 2, 3}, 1, []string{"10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, true},
		{"who is left takes none", false, []byte{1, 2}, 0, []string{"10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, true},
		{"who leaves is not judged", false, []byte{4}, 1, []string{"10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := lb.Frontend{ID: lb.FrontendID{VIP: netip.MustParseAddr("192.0.2.1"), Port: 80, Protocol: lb.TCP}, Service: service}
			p, verdicts := lb.Plan{}, map[lb.ProbeID]health.Verdict{}
			for last := byte(1); last <= 4; last++ {
				b := lb.Backend{ID: id(last), State: lb.Active, Weight: 1}
				if last == 3 {
					b.Weight = c.weight
				}
				if last == 4 {
					b.State = lb.Draining
				}
				f.Backends = append(f.Backends, b)
				probe := lb.Probe{ID: probeOf(f, b), Check: lb.Check{Kind: lb.CheckTCP, Reset: c.reset}}
				p.Probes = append(p.Probes, probe)
				verdicts[probe.ID] = health.Verdict{Healthy: !slices.Contains(c.sick, last)}
			}
			p.Frontends = []lb.Frontend{f}
			got, allOut := withHealth(p, verdicts)
			expectStates(t, got, c.want...)
			if len(allOut) > 0 != c.allOut {
				t.Errorf("all out: %v", allOut)
			}
			expectStates(t, p, "10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active", "10.1.0.4:80 draining")
		})
	}
}

// Backends that no next hop leads to are probed at once.
func TestSuspects(t *testing.T) {
	known, lost := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	probe := func(name string, via netip.Addr, tunneled bool) lb.Probe {
		return lb.Probe{ID: lb.ProbeID{Service: lb.ServiceID{Name: name}}, Via: lb.BackendID{Tunnel: via}, Tunneled: tunneled}
	}
	got := suspects([]lb.Probe{probe("a", known, true), probe("b", lost, true), probe("c", lost, false)}, map[netip.Addr]lb.NextHop{known: {}})
	if len(got) != 1 || got[0].Service.Name != "b" {
		t.Errorf("%v", got)
	}
}

func TestNATPorts(t *testing.T) {
	for text, ok := range map[string]bool{"61000-65535": true, "1-1": true, "0-5": false, "9-8": false, "5": false, "": false, "1-65536": false, "a-b": false} {
		c := Config{}
		c.NAT.Ports = text
		if got := c.natPorts(); (got.First != 0) != ok {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// What others probe is taken from them as long as they tell; who falls silent
// is stood in for. Nobody makes this node remember what it does not wait for.
func TestVerdictsOfOthers(t *testing.T) {
	a := New(Config{}, "test", slog.New(slog.DiscardHandler))
	a.census = &census{}
	probe := func(name string, elsewhere bool) lb.Probe {
		return lb.Probe{ID: lb.ProbeID{Service: lb.ServiceID{Namespace: "d", Name: name}, Target: netip.MustParseAddrPort("10.1.0.1:80"), Protocol: lb.TCP},
			Check: lb.Check{Kind: lb.CheckTCP, Interval: time.Second, Timeout: time.Second, Probers: 1}, Elsewhere: elsewhere}
	}
	p := lb.Plan{Probes: []lb.Probe{probe("mine", false), probe("theirs", true)}}
	names := func(now time.Time) string {
		all := ""
		for _, probe := range a.probesHere(p, now) {
			all += probe.ID.Service.Name + " "
		}
		return all
	}
	now := time.Now()
	if got := names(now); got != "mine " {
		t.Errorf("at first: %s", got)
	}
	if got := names(now.Add(time.Minute)); got != "mine theirs " {
		t.Errorf("never told: %s", got)
	}
	theirs := p.Probes[1].ID
	tell := func(name string, healthy bool) {
		if err := (peerNode{a}).Judge([]peer.Verdict{{Namespace: "d", Name: name, Target: theirs.Target, Protocol: lb.TCP, Healthy: healthy, Problem: strings.Repeat("x", 1000)}}); err != nil {
			t.Fatal(err)
		}
	}
	tell("theirs", false)
	tell("unheard-of", false)
	v := a.verdicts()
	if len(v) != 1 || v[theirs].Healthy || len(v[theirs].Problem) != maxTold {
		t.Errorf("%+v", v)
	}
	if got := names(time.Now()); got != "mine " {
		t.Errorf("told: %s", got)
	}
	if got := names(time.Now().Add(time.Minute)); got != "mine theirs " {
		t.Errorf("silent: %s", got)
	}
	tell("theirs", true)
	if !a.verdicts()[theirs].Healthy {
		t.Error("told that it is well again, and does not believe it")
	}
	p.Probes = p.Probes[:1]
	names(time.Now())
	if len(a.heard)+len(a.awaited) > 0 {
		t.Errorf("still remembers %v, %v", a.heard, a.awaited)
	}
}
