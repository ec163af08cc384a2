// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

const (
	shardServices = 10_000
	shardBackends = 5
	shardSlots    = 1024
	shardFlows    = 100 // of a service, at any time
	perChange     = 50 * time.Millisecond
)

// shardService is one service in simulation: its table, and its flows by slot.
type shardService struct {
	table   Table
	owners  [shardBackends]Backend
	flows   []shardFlow
	changed time.Duration
	asked   time.Duration
}

type shardFlow struct {
	slot  uint32
	owner Backend
	end   time.Duration
}

// BenchmarkContestedShare prints the share of slots that are contested in the
// steady state, with 20 changes of endpoints a second over 10,000 services; a
// tenth of the flows last 30 minutes on average, the others one.
func BenchmarkContestedShare(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	services := make([]shardService, shardServices)
	next := Backend(1)
	for i := range services {
		s := &services[i]
		for j := range s.owners {
			s.owners[j], next = next, next+1
		}
		s.table.Change(s.spread(), none, at(0))
	}
	clear := func(s *shardService, now time.Duration) {
		kept := s.flows[:0]
		for _, f := range s.flows {
			if f.end > now {
				kept = append(kept, f)
			}
		}
		for s.flows = kept; len(s.flows) < shardFlows; {
			life := time.Minute
			if random.IntN(10) == 0 {
				life = 30 * time.Minute
			}
			slot := uint32(random.IntN(shardSlots))
			s.flows = append(s.flows, shardFlow{slot, s.table.Owner(slot), now + time.Duration(-math.Log(random.Float64())*float64(life))})
		}
	}
	alive := map[*shardService]bool{}
	end := 40 * time.Minute
	for now := time.Duration(0); now < end; now += perChange {
		s := &services[random.IntN(shardServices)]
		clear(s, now)
		s.owners[random.IntN(shardBackends)], next = next, next+1
		s.table.Change(s.spread(), none, at(0).Add(now))
		s.changed, alive[s] = now, true
		for s := range alive {
			since := now - s.changed
			early, settled := since >= 2*time.Second && s.asked < s.changed+2*time.Second, since >= 11*time.Second && s.asked < s.changed+11*time.Second
			if !early && !settled && now-s.asked < 30*time.Second {
				continue
			}
			clear(s, now)
			s.asked = now
			s.census(at(0).Add(now))
			if s.table.Contested() == 0 {
				delete(alive, s)
			}
		}
	}
	contested := 0
	for i := range services {
		contested += services[i].table.Contested()
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(100*float64(contested)/(shardServices*shardSlots), "contested-%")
}

// spread is a table in which each backend has its own slots: as few change
// hands as can.
func (s *shardService) spread() []Backend {
	owners := make([]Backend, shardSlots)
	for i := range owners {
		owners[i] = s.owners[i%shardBackends]
	}
	return owners
}

// census lets the owners of living flows answer, and everybody else.
func (s *shardService) census(now time.Time) {
	answers := map[Backend]Answer{}
	s.table.named(func(b Backend) {
		if _, ok := answers[b]; !ok {
			answers[b] = Answer{Asked: now, Owns: make([]uint64, shardSlots/64)}
		}
	})
	for _, f := range s.flows {
		if a, ok := answers[f.owner]; ok {
			a.Owns[f.slot/64] |= 1 << (f.slot % 64)
		}
	}
	s.table.Census(answers)
}

// named calls f with each backend that any slot names, possibly several times.
func (t *Table) named(f func(Backend)) {
	for _, owner := range t.owners {
		f(owner)
	}
	for _, c := range t.contested {
		for _, b := range c.candidates {
			if b != 0 {
				f(b)
			}
		}
	}
}
