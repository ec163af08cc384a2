// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// DrainRequest drains by hand, on this LB node: a backend by its address, with
// its port or without, or all of a node by its name.
type DrainRequest struct {
	Name string `json:"name"`
	Undo bool   `json:"undo"`
}

func (a *Agent) drain(w http.ResponseWriter, r *http.Request) {
	var request DrainRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, largestRequest)).Decode(&request); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	known := false
	for _, f := range a.plan.Frontends {
		known = known || slices.ContainsFunc(f.Backends, func(b lb.Backend) bool { return named(b, request.Name) })
	}
	switch {
	case request.Undo:
		delete(a.byHand, request.Name)
	case known:
		a.byHand[request.Name] = true
	default:
		http.Error(w, fmt.Sprintf("no backend and no node of a backend is called %q; see fairlead status -o wide", request.Name), http.StatusNotFound)
		return
	}
	a.log.Info("drain by hand", "name", request.Name, "undo", request.Undo)
	a.trigger.Fire()
	writeJSON(w, struct{}{})
}

// named says whether a name means a backend.
func named(b lb.Backend, name string) bool {
	return name == b.ID.Target.String() || name == b.ID.Target.Addr().String() || name == b.Node
}

// withDrains is the plan with what is drained by hand taking no new flows,
// unless nobody else would.
func withDrains(p lb.Plan, byHand map[string]bool) lb.Plan {
	if len(byHand) == 0 {
		return p
	}
	p.Frontends = slices.Clone(p.Frontends)
	for i, f := range p.Frontends {
		backends, active := slices.Clone(f.Backends), 0
		for j, b := range backends {
			for name := range byHand {
				if b.State == lb.Active && named(b, name) {
					backends[j].State = lb.Draining
				}
			}
			if backends[j].State == lb.Active {
				active++
			}
		}
		if active > 0 {
			p.Frontends[i].Backends = backends
		}
	}
	return p
}

// leaving is a backend of one frontend that takes no new flows.
type leaving struct {
	frontend lb.FrontendID
	backend  lb.BackendID
}

// drained is the plan without the backends whose time to drain is over, and
// when the next one's is; zero: never.
func drained(p lb.Plan, since map[leaving]time.Time, now time.Time) (lb.Plan, time.Time) {
	var next time.Time
	still := map[leaving]bool{}
	frontends := slices.Clone(p.Frontends)
	for i, f := range frontends {
		kept := make([]lb.Backend, 0, len(f.Backends))
		for _, b := range f.Backends {
			key := leaving{f.ID, b.ID}
			if b.State == lb.Active {
				kept = append(kept, b)
				continue
			}
			still[key] = true
			if since[key].IsZero() {
				since[key] = now
			}
			end := since[key].Add(f.DrainTimeout)
			if f.DrainTimeout > 0 && !now.Before(end) {
				continue // whatever it still has is cut
			}
			kept = append(kept, b)
			if f.DrainTimeout > 0 && (next.IsZero() || end.Before(next)) {
				next = end
			}
		}
		frontends[i].Backends = kept
	}
	for key := range since {
		if !still[key] {
			delete(since, key)
		}
	}
	p.Frontends = frontends
	return p, next
}
