// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

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
