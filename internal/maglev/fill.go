// SPDX-License-Identifier: Apache-2.0

package maglev

import "math/bits"

// filler gives out the slots of one table.
type filler struct {
	table []uint32
	taken []uint64 // one bit a slot
	left  int      // slots that are free
	few   int      // so many left: search the list
	list  []uint32 // the free slots, in no order, once there are few
}

// fewFree is the number of free slots from which looking at each of them costs
// less than walking to the first of them, which takes slots/free steps.
func fewFree(slots int) int {
	return 1 << ((bits.Len(uint(slots)) + 1) / 2)
}

// equal gives all slots to backends of one weight, in turn.
func (f *filler) equal(walks []walk) {
	at := 0
	for f.left > f.few {
		n := min(len(walks)-at, f.left-f.few)
		f.walk(walks[at : at+n])
		if at += n; at == len(walks) {
			at = 0
		}
	}
	for f.left > 0 {
		f.search(&walks[at])
		if at++; at == len(walks) {
			at = 0
		}
	}
}

// weighted gives all slots to backends in the order of turns. Rounding shares
// down leaves fewer slots than backends: the first to ask get one more each.
func (f *filler) weighted(walks []walk, quotas []quota, turns []uint32) {
	extra := f.left
	for i := range quotas {
		extra -= int(quotas[i].floor)
	}
	for _, i := range turns {
		q := &quotas[i]
		if q.has == q.floor {
			if extra == 0 {
				continue
			}
			extra--
		}
		q.has++
		if f.left > f.few {
			f.walk(walks[i : i+1])
		} else {
			f.search(&walks[i])
		}
	}
}

// walk gives each backend the first free slot on its way.
func (f *filler) walk(walks []walk) {
	mask := uint32(len(f.table) - 1)
	taken := f.taken
	for i := range walks {
		w := &walks[i]
		at := w.next & mask
		for taken[at>>6]>>(at&63)&1 != 0 {
			at = (at + w.skip) & mask
		}
		taken[at>>6] |= 1 << (at & 63)
		f.table[at] = w.index
		w.next = at + w.skip
	}
	f.left -= len(walks)
}

// search gives a backend the same slot as walk would, found from the other
// side: slot s is step (s-next)/skip of its permutation, and an odd skip has
// an inverse.
func (f *filler) search(w *walk) {
	if len(f.list) == 0 {
		f.collect()
	}
	mask := uint32(len(f.table) - 1)
	inverse := invert(w.skip)
	best, nearest := 0, ^uint32(0)
	for i, s := range f.list {
		if step := (s - w.next) * inverse & mask; step < nearest {
			best, nearest = i, step
		}
	}
	s := f.list[best]
	f.list[best] = f.list[len(f.list)-1]
	f.list = f.list[:len(f.list)-1]
	f.table[s] = w.index
	f.left--
}

// collect lists the free slots.
func (f *filler) collect() {
	for i, word := range f.taken {
		free := ^word
		if len(f.table) < 64 {
			free &= 1<<len(f.table) - 1
		}
		for ; free != 0; free &= free - 1 {
			f.list = append(f.list, uint32(i*64+bits.TrailingZeros64(free)))
		}
	}
}

// invert returns the inverse of an odd number modulo 2^32: Newton's method
// doubles the right bits, of which x itself has three.
func invert(x uint32) uint32 {
	y := x
	for range 4 {
		y *= 2 - x*y
	}
	return y
}
