// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/lb"
)

// frontends are n services on two workers and this node itself.
func frontends(n int) (plan lb.Plan, sizes map[lb.FrontendID]int) {
	sizes = map[lb.FrontendID]int{}
	for i := range n {
		f := lb.Frontend{Mode: lb.ModeGeneve, ID: lb.FrontendID{VIP: netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}), Port: 80, Protocol: lb.TCP}}
		for _, b := range []struct {
			node, tunnel, target string
			mode                 lb.Mode
		}{{"w1", "10.0.0.1", "10.1.0.1:80", lb.ModeGeneve}, {"w1", "10.0.0.1", "10.1.0.2:80", lb.ModeGeneve}, {"w2", "10.0.0.2", "10.2.0.1:80", lb.ModeGeneve},
			{"lb", "", "10.3.0.1:80", lb.ModeLocal}, {"", "10.0.0.9", "10.0.0.9:80", lb.ModeIPIP}} {
			id := lb.BackendID{Target: netip.MustParseAddrPort(b.target), Mode: b.mode}
			if b.tunnel != "" {
				id.Tunnel = netip.MustParseAddr(b.tunnel)
			}
			f.Backends = append(f.Backends, lb.Backend{ID: id, Node: b.node})
		}
		plan.Frontends = append(plan.Frontends, f)
		sizes[f.ID] = 1024
	}
	return plan, sizes
}

// Each node is asked about its own backends alone, in one request as far as it
// can hold all; who cannot be asked is not.
func TestInquiries(t *testing.T) {
	plan, sizes := frontends(2*inquiryMost + 1)
	delete(sizes, plan.Frontends[0].ID) // not due
	c := newCensus(nil, 9471)
	requests, questions, targets := map[string]int{}, map[string]int{}, map[string]int{}
	for _, i := range c.inquiries(plan, sizes) {
		name := i.node + " " + i.at.String()
		requests[name]++
		questions[name] += len(i.questions)
		if len(i.questions) > inquiryMost || len(i.questions) != len(i.backends) || len(i.questions) != len(i.frontends) {
			t.Errorf("%s: %d questions, %d frontends, %d lists of backends", name, len(i.questions), len(i.frontends), len(i.backends))
		}
		for q, question := range i.questions {
			targets[name] += len(question.Targets)
			if question.Bits != 10 || len(question.Targets) != len(i.backends[q]) || question.Targets[0] != i.backends[q][0].Target {
				t.Fatalf("%s: %+v", name, question)
			}
		}
	}
	for name, each := range map[string]int{"w1 10.0.0.1:9471": 2, "w2 10.0.0.2:9471": 1, "lb invalid AddrPort": 1} {
		if requests[name] != 2 || questions[name] != 2*inquiryMost || targets[name] != each*2*inquiryMost {
			t.Errorf("%s: %d requests, %d questions, %d targets", name, requests[name], questions[name], targets[name])
		}
	}
	if len(requests) != 3 {
		t.Errorf("asked %v", requests)
	}
}

// When a frontend is asked about: early and settled after a change, steadily
// while it is contested, at once when flows are denied or nobody knows.
func TestCensusDue(t *testing.T) {
	begin := time.Unix(1000, 0)
	id := lb.FrontendID{Port: 80}
	for _, c := range []struct {
		name       string
		contest    dataplane.Contest
		draining   bool
		asked, now time.Duration // since begin
		due        bool
	}{
		{"never asked", dataplane.Contest{}, false, -1, 0, true},
		{"settled", dataplane.Contest{}, false, 0, time.Hour, false},
		{"not answered, just asked", dataplane.Contest{Unknown: true}, false, time.Second, 1500 * time.Millisecond, false},
		{"not answered", dataplane.Contest{Unknown: true}, false, time.Second, 2 * time.Second, true},
		{"denied, just asked", dataplane.Contest{Denied: true}, false, time.Second, 5 * time.Second, false},
		{"denied", dataplane.Contest{Denied: true}, false, time.Second, 6 * time.Second, true},
		{"draining", dataplane.Contest{}, true, time.Second, 6 * time.Second, true},
		{"just changed", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 9 * time.Second, 11 * time.Second, false},
		{"early", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 9 * time.Second, 12 * time.Second, true},
		{"between", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 12 * time.Second, 20 * time.Second, false},
		{"settled now", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 12 * time.Second, 22 * time.Second, true},
		{"after that", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 22 * time.Second, 48 * time.Second, false},
		{"steadily", dataplane.Contest{Contested: 1, Changed: begin.Add(10 * time.Second)}, false, 22 * time.Second, 53 * time.Second, true},
	} {
		census := newCensus(nil, 0)
		if c.contest.ID = id; c.asked >= 0 {
			census.last[id] = begin.Add(c.asked)
		}
		if got := census.due(c.contest, c.draining, begin.Add(c.now)); got != c.due {
			t.Errorf("%s: due %v", c.name, got)
		}
	}
}

// What is known of nodes and backends goes with them; who does not answer is
// told once, and again when it does.
func TestCensusForgets(t *testing.T) {
	plan, _ := frontends(2)
	c := newCensus(nil, 0)
	kept, gone := plan.Frontends[0], plan.Frontends[1]
	for _, f := range plan.Frontends {
		c.last[f.ID] = time.Unix(1, 0)
		c.flows[f.ID] = map[lb.BackendID]uint32{f.Backends[0].ID: 7, {UID: "another"}: 8}
	}
	var text strings.Builder
	log := slog.New(slog.NewTextHandler(&text, nil))
	for _, err := range []error{errors.New("no"), errors.New("no"), nil, nil} {
		c.note("w1", err, log)
		c.note("w3", err, log)
	}
	if got := strings.Count(text.String(), "node=w1"); got != 2 {
		t.Errorf("told %d times:\n%s", got, text.String())
	}
	plan.Frontends = plan.Frontends[:1]
	c.forget(plan)
	if n := c.flowsOf(kept.ID, kept.Backends[0].ID); n == nil || *n != 7 || c.flowsOf(kept.ID, lb.BackendID{UID: "another"}) != nil || c.flowsOf(gone.ID, gone.Backends[0].ID) != nil {
		t.Errorf("flows: %v", c.flows)
	}
	if fmt.Sprint(len(c.last), len(c.failed)) != "1 1" {
		t.Errorf("last: %v, failed: %v", c.last, c.failed)
	}
}
