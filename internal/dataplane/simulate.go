// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"math/bits"
	"slices"

	"fairlead.dev/fairlead/internal/lb"
)

// Simulated is what a plan would change about one frontend.
type Simulated struct {
	ID        lb.FrontendID
	Service   lb.ServiceID
	Mode      lb.Mode
	SlotsNow  uint32
	SlotsThen uint32
	Moved     float64                  // share of the flow hashes whose backend would change
	Lost      map[lb.BackendID]float64 // of a backend's hashes now, the share that others would get
	Gone      []lb.BackendID           // whose flows would end
}

// Simulate says what a plan would change, and changes nothing.
func (d *Dataplane) Simulate(plan lb.Plan) ([]Simulated, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil, ErrNotLoaded
	}
	var all []Simulated
	planned := map[lb.FrontendID]bool{}
	for _, f := range plan.Frontends {
		planned[f.ID] = true
		all = append(all, d.balancer.simulate(f))
	}
	for id, known := range d.balancer.frontends {
		if !planned[id] {
			all = append(all, d.balancer.simulate(lb.Frontend{ID: id, Service: known.applied.Service, Mode: known.applied.Mode}))
		}
	}
	slices.SortFunc(all, func(a, b Simulated) int { return a.ID.Compare(b.ID) })
	return all, nil
}

func (b *balancer) simulate(want lb.Frontend) Simulated {
	s := Simulated{ID: want.ID, Service: want.Service, Mode: want.Mode, Lost: map[lb.BackendID]float64{}}
	then := b.ownersOf(want)
	s.SlotsThen = uint32(len(then))
	known := b.frontends[want.ID]
	if known == nil || known.bits == 0 {
		return s
	}
	s.SlotsNow = uint32(known.table.Len())
	byNumber, alive := map[uint32]lb.BackendID{}, map[lb.BackendID]bool{}
	for _, backend := range want.Backends {
		alive[backend.ID] = true
	}
	for _, backend := range known.applied.Backends {
		byNumber[b.backends[backend.ID].number] = backend.ID
		if !alive[backend.ID] {
			s.Gone = append(s.Gone, backend.ID)
		}
	}
	// In steps of the finer of both tables, each step being as many hashes.
	steps := max(s.SlotsNow, s.SlotsThen)
	had, lost := map[lb.BackendID]float64{}, map[lb.BackendID]float64{}
	moved := 0
	for step := range steps {
		now := byNumber[known.table.Owner(at(step, steps, s.SlotsNow))]
		had[now]++
		if len(then) == 0 || then[at(step, steps, s.SlotsThen)] != now {
			moved++
			lost[now]++
		}
	}
	s.Moved = float64(moved) / float64(steps)
	for id, n := range lost {
		s.Lost[id] = n / had[id]
	}
	return s
}

// at is the slot of a table of a size that a step of steps is in.
func at(step, steps, size uint32) uint32 {
	return step >> (bits.TrailingZeros32(steps) - bits.TrailingZeros32(size))
}

// ownersOf is the table that a frontend would have.
func (b *balancer) ownersOf(want lb.Frontend) []lb.BackendID {
	active, ids := takers(want)
	if len(active) == 0 {
		return nil
	}
	indexes := make([]uint32, want.TableSize)
	b.builder.Build(indexes, active)
	owners := make([]lb.BackendID, want.TableSize)
	for slot, index := range indexes {
		owners[slot] = ids[index]
	}
	return owners
}
