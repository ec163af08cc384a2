// SPDX-License-Identifier: Apache-2.0

// Package slots says for each slot of a service who takes new flows, and who
// may still own older ones. It is pure: time comes as an argument.
package slots

import (
	"math/bits"
	"slices"
	"time"
)

// MaxCandidates is how many backends beside its own a slot can remember.
const MaxCandidates = 7

// Settle is how long after a slot's last change an answer must have been asked
// for, to end its contest: packets that were on their way have arrived by then.
const Settle = 10 * time.Second

// Backend is a backend's number, unique while any slot names it; 0 is none.
type Backend = uint32

// Table is the slots of one service: a power of two of them, or none. A slot is
// a contiguous range of the flow hash at every size.
//
// Invariant: a slot's candidates are at most MaxCandidates, without duplicates,
// and never its own backend.
type Table struct {
	owners    []Backend
	contested map[uint32]contest
}

// contest is what a slot that changed hands still remembers.
type contest struct {
	candidates []Backend // newest first
	changed    time.Time // when the slot's backend last changed
}

// Len returns the number of slots.
func (t *Table) Len() int { return len(t.owners) }

// Contested returns how many slots have candidates.
func (t *Table) Contested() int { return len(t.contested) }

// Owner returns who takes new flows of a slot.
func (t *Table) Owner(slot uint32) Backend { return t.owners[slot] }

// Candidates returns who else may own flows of a slot, newest first. The slice
// must not be changed.
func (t *Table) Candidates(slot uint32) []Backend { return t.contested[slot].candidates }

// Named calls f with each backend that any slot names, possibly several times.
func (t *Table) Named(f func(Backend)) {
	for _, owner := range t.owners {
		f(owner)
	}
	for _, c := range t.contested {
		for _, b := range c.candidates {
			f(b)
		}
	}
}

// Change makes owners the slots' backends; it keeps the slice. Whoever had a
// slot, or a part of its range when the size changes, becomes a candidate.
// Backends that are gone are forgotten; whoever the dataplane let stand in for
// one that is becomes a candidate in its place.
func (t *Table) Change(owners []Backend, gone func(Backend) bool, now time.Time) {
	next := Table{owners: owners, contested: map[uint32]contest{}}
	if len(owners) > 0 && len(t.owners) > 0 {
		for slot := range owners {
			if c := t.inherit(uint32(slot), owners, gone, now); len(c.candidates) > 0 {
				next.contested[uint32(slot)] = c
			}
		}
	}
	*t = next
}

// inherit collects what is known of the range of a slot in a new table.
func (t *Table) inherit(slot uint32, owners []Backend, gone func(Backend) bool, now time.Time) contest {
	from, to := overlap(slot, len(owners), len(t.owners))
	if from+1 == to && t.owners[from] == owners[slot] && len(t.contested[from].candidates) == 0 {
		return contest{}
	}
	var c contest
	add := func(b Backend) bool {
		if b == 0 || b == owners[slot] || gone(b) || slices.Contains(c.candidates, b) || len(c.candidates) == MaxCandidates {
			return false
		}
		c.candidates = append(c.candidates, b)
		return true
	}
	for old := from; old < to; old++ {
		before := t.owners[old]
		if gone(before) {
			before = t.standIn(old, gone)
		}
		if add(before) {
			c.changed = now
		}
	}
	for old := from; old < to; old++ {
		known := t.contested[old]
		for _, b := range known.candidates {
			add(b)
		}
		if known.changed.After(c.changed) {
			c.changed = known.changed
		}
	}
	return c
}

// overlap returns the slots [from, to) of a table of oldSize that share hashes
// with one slot of a table of newSize.
func overlap(slot uint32, newSize, oldSize int) (from, to uint32) {
	shift := bits.TrailingZeros(uint(newSize)) - bits.TrailingZeros(uint(oldSize))
	if shift >= 0 {
		return slot >> shift, slot>>shift + 1
	}
	return slot << -shift, (slot + 1) << -shift
}

// StandIns is how many following slots the dataplane tries for a backend that
// is gone.
const StandIns = 8

// standIn returns who took new flows of a slot whose backend is gone.
func (t *Table) standIn(slot uint32, gone func(Backend) bool) Backend {
	for i := range uint32(StandIns) {
		if b := t.owners[(slot+1+i)%uint32(len(t.owners))]; b != 0 && !gone(b) {
			return b
		}
	}
	return 0
}

// Answer is what a backend's node says about one backend: in which slots it
// owns flows, at the table's size or another, and when it was asked.
type Answer struct {
	Asked time.Time
	Owns  []uint64 // a bitmap; its length in bits is a power of two
}

// owns says whether any flow is in a slot's range.
func (a Answer) owns(slot uint32, size int) bool {
	from, to := overlap(slot, size, 64*len(a.Owns))
	for at := from; at < to; at++ {
		if a.Owns[at/64]&(1<<(at%64)) != 0 {
			return true
		}
	}
	return false
}

// Census takes in what backends' nodes answered. A candidate that owns nothing
// in a slot, asked Settle after the slot's last change, leaves it; a backend
// that owns flows in a slot of another becomes a candidate, in place of one
// that owns nothing if there are too many. Who did not answer stays what it is.
func (t *Table) Census(answers map[Backend]Answer) {
	for slot, c := range t.contested {
		c.candidates = slices.DeleteFunc(slices.Clone(c.candidates), func(b Backend) bool {
			a, ok := answers[b]
			return ok && !a.Asked.Before(c.changed.Add(Settle)) && !a.owns(slot, len(t.owners))
		})
		t.keep(slot, c)
	}
	for _, b := range sorted(answers) {
		a := answers[b]
		a.each(len(t.owners), func(slot uint32) {
			c := t.contested[slot]
			if t.owners[slot] == b || slices.Contains(c.candidates, b) {
				return
			}
			c.candidates = slices.Clone(c.candidates)
			if len(c.candidates) == MaxCandidates {
				idle := slices.IndexFunc(c.candidates, func(other Backend) bool {
					known, ok := answers[other]
					return ok && !known.owns(slot, len(t.owners))
				})
				if idle < 0 {
					return
				}
				c.candidates = slices.Delete(c.candidates, idle, idle+1)
			}
			c.candidates = append(c.candidates, b)
			t.keep(slot, c)
		})
	}
}

// each calls f with each slot of a table of this size that has flows.
func (a Answer) each(size int, f func(slot uint32)) {
	last := -1
	for word, set := range a.Owns {
		for ; set != 0; set &= set - 1 {
			at := uint32(64*word + bits.TrailingZeros64(set))
			from, to := overlap(at, 64*len(a.Owns), size)
			for slot := from; slot < to; slot++ {
				// Several bits of a finer bitmap are one slot.
				if int(slot) > last {
					f(slot)
					last = int(slot)
				}
			}
		}
	}
}

// Expire ends the contests for candidates whose nodes nobody can ask, once
// their slot has not changed for so long that none of its flows can be alive.
func (t *Table) Expire(asked func(Backend) bool, idle time.Duration, now time.Time) {
	for slot, c := range t.contested {
		if now.Sub(c.changed) < idle {
			continue
		}
		c.candidates = slices.DeleteFunc(slices.Clone(c.candidates), func(b Backend) bool { return !asked(b) })
		t.keep(slot, c)
	}
}

func (t *Table) keep(slot uint32, c contest) {
	if len(c.candidates) == 0 {
		delete(t.contested, slot)
		return
	}
	t.contested[slot] = c
}

// Suspect makes backends candidates of every slot: those that have never said
// what they own. At most MaxCandidates of a slot are remembered.
func (t *Table) Suspect(backends []Backend) {
	if len(backends) == 0 {
		return
	}
	for slot := range t.owners {
		c := t.contested[uint32(slot)]
		fresh := slices.Clone(c.candidates)
		for _, b := range backends {
			if b != t.owners[slot] && !slices.Contains(fresh, b) && len(fresh) < MaxCandidates {
				fresh = append(fresh, b)
			}
		}
		c.candidates = fresh
		t.keep(uint32(slot), c)
	}
}

func sorted(answers map[Backend]Answer) []Backend {
	all := make([]Backend, 0, len(answers))
	for b := range answers {
		all = append(all, b)
	}
	slices.Sort(all)
	return all
}
