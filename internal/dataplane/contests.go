// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/slots"
)

// candidateRow is a row of candidates, which the slots of several services may
// name.
type candidateRow struct {
	row   uint32
	users int // services
}

// writeSlots writes the words of a service's slots, and the rows of candidates
// that they name before them.
func (b *balancer) writeSlots(known *frontend, now time.Time) error {
	if known.bits == 0 {
		b.keepRows(known, nil, now)
		return nil
	}
	run := b.maps.slots[known.offset : known.offset+1<<known.bits]
	used := map[slots.List]bool{}
	var last slots.List
	row := uint32(0)
	for slot := range run {
		if list := known.table.Candidates(uint32(slot)); list != last {
			var err error
			if row, err = b.useRow(known, used, list, now); err != nil {
				return err
			}
			last = list
		}
		b.maps.store(&run[slot], slotWord(known.table.Owner(uint32(slot)), row))
	}
	known.sum = checksum(run)
	b.keepRows(known, used, now)
	return nil
}

// useRow returns the row that holds a list; 0 for the empty one.
func (b *balancer) useRow(known *frontend, used map[slots.List]bool, list slots.List, now time.Time) (uint32, error) {
	if list == (slots.List{}) {
		return 0, nil
	}
	row := b.rows[list]
	if row == nil {
		number, err := b.rowNumbers.take(now)
		if err != nil {
			return 0, fmt.Errorf("program the candidates of contested slots: %w", err)
		}
		row = &candidateRow{row: number}
		b.rows[list] = row
		b.maps.candidates[number] = bpfCandidateRow{Number: list}
	}
	used[list] = true
	if !known.rows[list] {
		known.rows[list] = true
		row.users++
	}
	return row.row, nil
}

// keepRows frees the rows that a service's slots do not name any more.
func (b *balancer) keepRows(known *frontend, used map[slots.List]bool, now time.Time) {
	for list := range known.rows {
		if !used[list] {
			delete(known.rows, list)
			b.dropRow(list, now)
		}
	}
}

func (b *balancer) dropRow(list slots.List, now time.Time) {
	row := b.rows[list]
	if row.users--; row.users == 0 {
		delete(b.rows, list)
		b.rowNumbers.give(row.row, now)
	}
}

// suspects are the backends of a frontend that never said what they own.
func (b *balancer) suspects(known *frontend, want lb.Frontend) []uint32 {
	if !b.suspicious || want.Mode.Held() || want.Mode == lb.ModeNAT {
		return nil
	}
	var all []uint32
	alive := map[lb.BackendID]bool{}
	for _, backend := range want.Backends {
		alive[backend.ID] = true
		if !known.answered[backend.ID] {
			all = append(all, b.backends[backend.ID].number)
		}
	}
	for id := range known.answered {
		if !alive[id] {
			delete(known.answered, id)
		}
	}
	return all
}

// suspect makes them candidates everywhere.
func (b *balancer) suspect(known *frontend, want lb.Frontend) {
	suspects := b.suspects(known, want)
	known.unknown = len(suspects) > 0
	known.table.Suspect(suspects)
}

// Answers are what backends' nodes said about the backends of a frontend.
type Answers map[lb.FrontendID]map[lb.BackendID]slots.Answer

// Census takes in what backends' nodes answered: contests end when nothing
// needs them, and begin where somebody owns flows of another's slots.
func (d *Dataplane) Census(answers Answers) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	return d.balancer.census(answers, d.now())
}

func (b *balancer) census(answers Answers, now time.Time) error {
	for id, of := range answers {
		known := b.frontends[id]
		if known == nil || known.bits == 0 {
			continue
		}
		byNumber := map[uint32]slots.Answer{}
		for backend, answer := range of {
			if alive := b.backends[backend]; alive != nil && uses(known.applied, backend) {
				known.answered[backend] = true
				byNumber[alive.number] = answer
			}
		}
		if !b.forgetful {
			known.table.Census(byNumber)
		}
		b.suspect(known, known.applied)
		if err := b.writeSlots(known, now); err != nil {
			return fmt.Errorf("program %s of Service %s: %w", id, known.applied.Service, err)
		}
	}
	return nil
}

func uses(f lb.Frontend, id lb.BackendID) bool {
	for _, b := range f.Backends {
		if b.ID == id {
			return true
		}
	}
	return false
}

// Expire ends contests that nobody can be asked about, once none of the flows
// can be alive.
func (d *Dataplane) Expire() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	return d.balancer.expire(d.config.Timeouts, d.now())
}

func (b *balancer) expire(timeouts lb.Timeouts, now time.Time) error {
	for id, known := range b.frontends {
		if b.suspicious && !known.applied.Mode.Held() && known.applied.Mode != lb.ModeNAT || known.table.Contested() == 0 {
			continue // the census ends its contests, or there are none
		}
		idle := timeouts.TCP
		if id.Protocol == lb.UDP {
			idle = timeouts.UDP
		}
		known.table.Expire(idle, now)
		if err := b.writeSlots(known, now); err != nil {
			return err
		}
	}
	return nil
}

// Contest is what of a frontend's slots is uncertain.
type Contest struct {
	ID        lb.FrontendID
	Slots     int
	Contested int
	Changed   time.Time // when its backends last changed
	Denied    bool      // in settled slots, since this was last asked
	Unknown   bool      // a backend has never answered
}

// Contests returns all frontends, with what is uncertain about them.
func (d *Dataplane) Contests() []Contest {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil
	}
	all := make([]Contest, 0, len(d.balancer.frontends))
	for id, known := range d.balancer.frontends {
		denials := atomic.LoadUint64(&d.maps.denials[known.number])
		all = append(all, Contest{ID: id, Slots: known.table.Len(), Contested: known.table.Contested(), Changed: known.changed, Denied: denials != known.denials,
			Unknown: known.unknown})
		known.denials = denials
	}
	return all
}
