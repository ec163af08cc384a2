// SPDX-License-Identifier: Apache-2.0

package slots

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

func none(Backend) bool { return false }

func is(gone ...Backend) func(Backend) bool {
	return func(b Backend) bool { return slices.Contains(gone, b) }
}

func at(seconds int) time.Time { return time.Unix(int64(seconds), 0) }

// table is a table with owners, to which changes were applied in turn.
func table(owners ...Backend) *Table {
	t := &Table{}
	t.Change(owners, none, at(0))
	return t
}

func expect(t *testing.T, table *Table, want ...string) {
	t.Helper()
	var got []string
	for slot := range table.owners {
		list := table.Candidates(uint32(slot))
		text := fmt.Sprint(table.Owner(uint32(slot)))
		for _, b := range list {
			if b != 0 {
				text += fmt.Sprintf(" %d", b)
			}
		}
		got = append(got, text)
	}
	if !slices.Equal(got, want) {
		t.Errorf("owner and candidates:\n%q, want\n%q", got, want)
	}
}

func TestChange(t *testing.T) {
	x := table(1, 2, 1, 2)
	expect(t, x, "1", "2", "1", "2")
	x.Change([]Backend{1, 3, 3, 2}, none, at(1))
	expect(t, x, "1", "3 2", "3 1", "2")
	x.Change([]Backend{4, 4, 4, 4}, none, at(2))
	expect(t, x, "4 1", "4 3 2", "4 3 1", "4 2")
	// Back again: nobody is forgotten, and the owner is no candidate of its own.
	x.Change([]Backend{1, 3, 3, 2}, none, at(3))
	expect(t, x, "1 4", "3 4 2", "3 4 1", "2 4")
	x.Change([]Backend{1, 3, 3, 2}, is(4), at(4))
	expect(t, x, "1", "3 2", "3 1", "2")
	if got := x.Contested(); got != 2 {
		t.Errorf("%d contested, want 2", got)
	}
}

// Whoever the dataplane let stand in for a backend that is gone becomes a
// candidate in its place.
func TestChangeAfterStandIn(t *testing.T) {
	x := table(1, 1, 2, 3)
	x.Change([]Backend{3, 2, 2, 3}, is(1), at(1))
	expect(t, x, "3 2", "2", "2", "3")
}

func TestResize(t *testing.T) {
	x := table(1, 2)
	x.Change([]Backend{1, 2}, none, at(0))
	x.Change([]Backend{1, 3, 2, 2, 2, 2, 3, 1}, none, at(1))
	expect(t, x, "1", "3 1", "2 1", "2 1", "2", "2", "3 2", "1 2")
	x.Change([]Backend{2, 1}, none, at(2))
	expect(t, x, "2 1 3", "1 2 3")
	// More than can be remembered: the newest stay.
	x = table(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	x.Change([]Backend{20, 21}, none, at(1))
	expect(t, x, "20 1 2 3 4 5 6 7", "21 9 10 11 12 13 14 15")
}

func TestCensus(t *testing.T) {
	owns := func(slots ...uint32) []uint64 {
		bitmap := []uint64{0}
		for _, s := range slots {
			bitmap[0] |= 0xffff << (16 * s) // of 4 slots, 16 bits each
		}
		return bitmap
	}
	x := table(1, 1, 1, 1)
	x.Change([]Backend{2, 2, 1, 1}, none, at(100))
	expect(t, x, "2 1", "2 1", "1", "1")
	// Too early: what was on its way may not have arrived.
	x.Census(map[Backend]Answer{1: {Asked: at(109), Owns: owns()}})
	expect(t, x, "2 1", "2 1", "1", "1")
	x.Census(map[Backend]Answer{1: {Asked: at(110), Owns: owns(1)}})
	expect(t, x, "2", "2 1", "1", "1")
	// Who did not answer stays.
	x.Census(map[Backend]Answer{2: {Asked: at(120), Owns: owns(0, 3)}})
	expect(t, x, "2", "2 1", "1", "1 2")
	x.Census(map[Backend]Answer{1: {Asked: at(121), Owns: owns(2)}, 2: {Asked: at(121), Owns: owns(1)}})
	expect(t, x, "2", "2", "1", "1")
}

// A list that is full takes an owner in place of one that owns nothing, and of
// no other.
func TestCensusFullList(t *testing.T) {
	x := table(1)
	for b := range Backend(8) {
		x.Change([]Backend{b + 2}, none, at(100))
	}
	expect(t, x, "9 8 7 6 5 4 3 2")
	x.Census(map[Backend]Answer{1: {Asked: at(101), Owns: []uint64{1}}})
	expect(t, x, "9 8 7 6 5 4 3 2")
	x.Census(map[Backend]Answer{1: {Asked: at(101), Owns: []uint64{1}}, 5: {Asked: at(101), Owns: []uint64{0}}, 4: {Asked: at(101), Owns: []uint64{0}}})
	expect(t, x, "9 8 7 6 4 3 2 1")
}

func TestSuspect(t *testing.T) {
	x := table(1, 2, 1, 3)
	x.Suspect([]Backend{2})
	expect(t, x, "1 2", "2", "1 2", "3 2")
	if got := x.Contested(); got != 3 {
		t.Errorf("%d contested, want 3", got)
	}
	x.Suspect([]Backend{2, 3})
	expect(t, x, "1 2 3", "2 3", "1 2 3", "3 2")
	x.Suspect(nil)
	expect(t, x, "1", "2", "1", "3")
}

func TestExpire(t *testing.T) {
	x := table(1, 1)
	x.Change([]Backend{2, 1}, none, at(100))
	x.Change([]Backend{2, 3}, none, at(200))
	x.Expire(50*time.Second, at(160))
	expect(t, x, "2", "3 1")
	x.Expire(50*time.Second, at(249))
	expect(t, x, "2", "3 1")
	x.Expire(50*time.Second, at(250))
	expect(t, x, "2", "3")
}

// naive is a second implementation, by hash: for each of 64 points of the hash
// it remembers everybody who ever took new flows there.
type naive [64]map[Backend]bool

// As long as no list overflows, every earlier owner of a hash is its slot's
// backend or a candidate; and nobody else is.
func TestNobodyIsForgotten(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		var history naive
		for i := range history {
			history[i] = map[Backend]bool{}
		}
		x, dead := &Table{}, map[Backend]bool{}
		for step := range 5 {
			size := 1 << (2 * random.IntN(4)) // 1, 4, 16, 64
			owners := make([]Backend, size)
			for i := range owners {
				for owners[i] == 0 || dead[owners[i]] {
					owners[i] = Backend(1 + random.IntN(6))
				}
			}
			if random.IntN(3) == 0 && len(dead) < 3 && x.Len() > 0 {
				b := Backend(1 + random.IntN(6))
				if !slices.Contains(owners, b) {
					dead[b] = true
				}
			}
			gone := func(b Backend) bool { return dead[b] }
			before := *x
			x.Change(owners, gone, at(step))
			for point := range history {
				if before.Len() > 0 {
					if old := before.Owner(uint32(point * before.Len() / 64)); dead[old] {
						if stood := before.standIn(uint32(point*before.Len()/64), gone); stood != 0 {
							history[point][stood] = true
						}
					}
				}
				slot := uint32(point * size / 64)
				history[point][owners[slot]] = true
				list := x.Candidates(slot)
				for b := range history[point] {
					if !dead[b] && b != x.Owner(slot) && !list.Has(b) {
						t.Fatalf("step %d: %d may own flows at %d/64, and slot %d has %d and %v", step, b, point, slot, x.Owner(slot), list)
					}
				}
			}
		}
	}
}
