// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"net/netip"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

func backendAt(address, node string, state lb.BackendState) lb.Backend {
	return lb.Backend{ID: lb.BackendID{Target: netip.MustParseAddrPort(address)}, Node: node, State: state, Weight: 1}
}

func statesOf(p lb.Plan) (states []string) {
	for _, b := range p.Frontends[0].Backends {
		states = append(states, b.ID.Target.String()+" "+b.State.String())
	}
	return states
}

func expectStates(t *testing.T, p lb.Plan, want ...string) {
	t.Helper()
	got := statesOf(p)
	if len(got) != len(want) {
		t.Fatalf("%q, want %q", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A backend that leaves is cut when its time is over, counted from when it was
// first seen to leave; one that comes back begins anew.
func TestDrainTimeout(t *testing.T) {
	plan := lb.Plan{Frontends: []lb.Frontend{{DrainTimeout: time.Minute, Backends: []lb.Backend{
		backendAt("10.1.0.1:80", "w", lb.Active), backendAt("10.1.0.2:80", "w", lb.Draining)}}}}
	since, begin := map[leaving]time.Time{}, time.Unix(1000, 0)
	for _, c := range []struct {
		after time.Duration
		state lb.BackendState
		left  bool
	}{{0, lb.Draining, true}, {59 * time.Second, lb.Failing, true}, {60 * time.Second, lb.Draining, false}, {90 * time.Second, lb.Draining, false},
		{100 * time.Second, lb.Active, true}, {110 * time.Second, lb.Draining, true}, {169 * time.Second, lb.Draining, true}, {170 * time.Second, lb.Draining, false}} {
		plan.Frontends[0].Backends[1].State = c.state
		got, next := drained(plan, since, begin.Add(c.after))
		if left := len(got.Frontends[0].Backends) == 2; left != c.left {
			t.Errorf("after %s, %s: still there: %v", c.after, c.state, left)
		}
		if (c.left && c.state != lb.Active) != (next.After(begin.Add(c.after))) {
			t.Errorf("after %s: to be looked at again at %s", c.after, next)
		}
	}
	plan.Frontends[0].DrainTimeout = 0
	if got, next := drained(plan, since, begin.Add(time.Hour)); len(got.Frontends[0].Backends) != 2 || !next.IsZero() {
		t.Error("a backend was cut that may drain for ever")
	}
}

func TestDrainByHand(t *testing.T) {
	plan := lb.Plan{Frontends: []lb.Frontend{{Backends: []lb.Backend{
		backendAt("10.1.0.1:80", "w1", lb.Active), backendAt("10.1.0.2:80", "w1", lb.Active), backendAt("10.1.0.3:80", "w2", lb.Active)}}}}
	expectStates(t, withDrains(plan, map[string]bool{"10.1.0.1": true}), "10.1.0.1:80 draining", "10.1.0.2:80 active", "10.1.0.3:80 active")
	expectStates(t, withDrains(plan, map[string]bool{"w1": true}), "10.1.0.1:80 draining", "10.1.0.2:80 draining", "10.1.0.3:80 active")
	// Somebody must take new flows.
	expectStates(t, withDrains(plan, map[string]bool{"w1": true, "10.1.0.3:80": true}), "10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active")
	expectStates(t, plan, "10.1.0.1:80 active", "10.1.0.2:80 active", "10.1.0.3:80 active")
}
