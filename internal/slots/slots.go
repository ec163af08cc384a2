// SPDX-License-Identifier: Apache-2.0

// Package slots says for each slot of a service who takes new flows, and who
// may still own older ones. It is pure: time comes as an argument.
package slots

import (
	"math/bits"
	"slices"
	"time"
)

const (
	// MaxCandidates is how many backends beside its own a slot can remember.
	MaxCandidates = 7
	// StandIns is how many following slots the dataplane tries for a backend
	// that is gone.
	StandIns = 8
	// Settle is how long after a slot's last change an answer must have been
	// asked for, to end its contest: what was on its way has arrived by then.
	Settle = 10 * time.Second
)

// Backend is a backend's number, unique while any slot names it; 0 is none.
type Backend = uint32

// List is backends without duplicates, the newest first; 0 ends it.
type List [MaxCandidates]Backend

// Has says whether a backend is in the list.
func (l *List) Has(b Backend) bool { return slices.Contains(l[:], b) }

// Full says whether there is no room left.
func (l *List) Full() bool { return l[MaxCandidates-1] != 0 }

// add appends a backend, if it is not there and there is room.
func (l *List) add(b Backend) bool {
	if b == 0 || l.Has(b) || l.Full() {
		return false
	}
	l[slices.Index(l[:], 0)] = b
	return true
}

// drop removes the backends that f says.
func (l *List) drop(f func(Backend) bool) {
	var kept List
	for _, b := range l {
		if b != 0 && !f(b) {
			kept.add(b)
		}
	}
	*l = kept
}

// Table is the slots of one service: a power of two of them, or none. A slot is
// a contiguous range of the flow hash at every size. The zero Table has none.
//
// Invariant: a slot's own backend is never among its candidates.
type Table struct {
	owners    []Backend
	contested map[uint32]contest
	suspects  []Backend
}

// contest is what a slot that changed hands still remembers.
type contest struct {
	candidates List
	changed    time.Time // when the slot's backend last changed
}

// Len returns the number of slots.
func (t *Table) Len() int { return len(t.owners) }

// Owner returns who takes new flows of a slot.
func (t *Table) Owner(slot uint32) Backend { return t.owners[slot] }

// Contested returns how many slots have candidates.
func (t *Table) Contested() int {
	if len(t.suspects) > 1 {
		return len(t.owners)
	}
	contested := len(t.contested)
	if len(t.suspects) == 1 {
		for slot, owner := range t.owners {
			if _, ok := t.contested[uint32(slot)]; !ok && owner != t.suspects[0] {
				contested++
			}
		}
	}
	return contested
}

// Candidates returns who else may own flows of a slot: whoever is known to, and
// the suspects.
func (t *Table) Candidates(slot uint32) List {
	list := t.contested[slot].candidates
	for _, b := range t.suspects {
		if b != t.owners[slot] {
			list.add(b)
		}
	}
	return list
}

// Suspect makes these backends, and no others, candidates of every slot: those
// that have never said what they own.
func (t *Table) Suspect(backends []Backend) { t.suspects = backends }

// Restore makes the table what another agent left: these owners and candidates,
// which it keeps, as if all had changed just now.
func (t *Table) Restore(owners []Backend, candidates map[uint32]List, now time.Time) {
	*t = Table{owners: owners, contested: map[uint32]contest{}}
	for slot, list := range candidates {
		t.keep(slot, contest{list, now})
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
			if c := t.inherit(uint32(slot), owners, gone, now); c.candidates != (List{}) {
				next.contested[uint32(slot)] = c
			}
		}
	}
	*t = next
}

// inherit collects what is known of the range of a slot in a new table.
func (t *Table) inherit(slot uint32, owners []Backend, gone func(Backend) bool, now time.Time) contest {
	from, to := overlap(slot, len(owners), len(t.owners))
	if known, ok := t.contested[from]; !ok && from+1 == to && t.owners[from] == owners[slot] {
		return known
	}
	var c contest
	add := func(b Backend) bool { return b != owners[slot] && !gone(b) && c.candidates.add(b) }
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
		known, ok := t.contested[old]
		if !ok {
			continue
		}
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
	Owns  []uint64 // a bitmap; its length in bits is a power of two, 64 at least
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

// each calls f with each slot of a table of this size that has flows.
func (a Answer) each(size int, f func(slot uint32)) {
	next := uint32(0)
	for word, set := range a.Owns {
		for ; set != 0; set &= set - 1 {
			from, to := overlap(uint32(64*word+bits.TrailingZeros64(set)), 64*len(a.Owns), size)
			for slot := max(from, next); slot < to; slot++ { // bits of a finer bitmap share a slot
				f(slot)
				next = slot + 1
			}
		}
	}
}

// Census takes in what backends' nodes answered. A candidate that owns nothing
// in a slot, asked Settle after the slot's last change, leaves it; a backend
// that owns flows in a slot of another becomes a candidate, in place of one
// that owns nothing if there are too many. Who did not answer stays what it is.
func (t *Table) Census(answers map[Backend]Answer) {
	for slot, c := range t.contested {
		c.candidates.drop(func(b Backend) bool {
			a, ok := answers[b]
			return ok && !a.Asked.Before(c.changed.Add(Settle)) && !a.owns(slot, len(t.owners))
		})
		t.keep(slot, c)
	}
	for _, b := range sorted(answers) {
		answers[b].each(len(t.owners), func(slot uint32) { t.claim(slot, b, answers) })
	}
}

// claim makes a backend that owns flows in a slot one of its candidates.
func (t *Table) claim(slot uint32, b Backend, answers map[Backend]Answer) {
	c := t.contested[slot]
	if t.owners[slot] == b || c.candidates.Has(b) {
		return
	}
	if c.candidates.Full() {
		dropped := false
		c.candidates.drop(func(other Backend) bool {
			a, ok := answers[other]
			idle := ok && !dropped && !a.owns(slot, len(t.owners))
			dropped = dropped || idle
			return idle
		})
	}
	c.candidates.add(b)
	t.keep(slot, c)
}

// Expire ends the contests of slots that have not changed for so long that no
// flow of before can be alive: where nobody can be asked.
func (t *Table) Expire(idle time.Duration, now time.Time) {
	for slot, c := range t.contested {
		if now.Sub(c.changed) >= idle {
			delete(t.contested, slot)
		}
	}
}

func (t *Table) keep(slot uint32, c contest) {
	if c.candidates == (List{}) {
		delete(t.contested, slot)
		return
	}
	t.contested[slot] = c
}

func sorted(answers map[Backend]Answer) []Backend {
	all := make([]Backend, 0, len(answers))
	for b := range answers {
		all = append(all, b)
	}
	slices.Sort(all)
	return all
}
