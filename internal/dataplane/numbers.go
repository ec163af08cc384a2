// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"math/bits"
	"time"
)

// rest is how long a number or a run of slots that nothing names any more
// stays unused: a packet may have read it just before.
const rest = time.Second

type resting struct {
	value uint32
	since time.Time
}

// numbers gives out rows of an array, from 1: 0 means none. Those that were
// given back come again last, and not before they have rested.
type numbers struct {
	limit string // the field of the configuration that sets the size
	size  uint32 // rows, 0 included
	fresh uint32 // the lowest that was never given out
	back  []resting
	used  uint32
}

func newNumbers(limit string, size int) *numbers {
	return &numbers{limit: limit, size: uint32(size), fresh: 1}
}

func (n *numbers) take(now time.Time) (uint32, error) {
	if n.fresh < n.size {
		n.fresh++
		n.used++
		return n.fresh - 1, nil
	}
	if len(n.back) > 0 && now.Sub(n.back[0].since) >= rest {
		value := n.back[0].value
		n.back = n.back[1:]
		n.used++
		return value, nil
	}
	return 0, full(n.limit, n.size-1)
}

func (n *numbers) give(value uint32, now time.Time) {
	n.back = append(n.back, resting{value, now})
	n.used--
}

func full(limit string, size uint32) error {
	return fmt.Errorf("%s: all %d are in use; raise limits.%s in the agent's configuration and restart it", limit, size, limit)
}

// runs gives out runs of slots of a power of two, aligned to their length, by
// halving larger ones (the buddy system).
type runs struct {
	size uint32
	free [maxBits + 1]map[uint32]bool // offsets by log2 of the length
	back []restingRun
	used uint32
}

type restingRun struct {
	offset, bits uint32
	since        time.Time
}

const maxBits = 17 // 131,072 slots

func newRuns(size int) *runs {
	r := &runs{size: uint32(size)}
	for i := range r.free {
		r.free[i] = map[uint32]bool{}
	}
	for offset := uint32(0); offset < r.size; {
		width := min(maxBits, uint32(bits.Len32(r.size-offset)-1))
		if offset > 0 {
			width = min(width, uint32(bits.TrailingZeros32(offset)))
		}
		r.free[width][offset] = true
		offset += 1 << width
	}
	return r
}

func (r *runs) take(width uint32, now time.Time) (uint32, error) {
	for len(r.back) > 0 && now.Sub(r.back[0].since) >= rest {
		r.release(r.back[0].offset, r.back[0].bits)
		r.back = r.back[1:]
	}
	for from := width; from <= maxBits; from++ {
		offset, ok := lowest(r.free[from])
		if !ok {
			continue
		}
		delete(r.free[from], offset)
		for half := from; half > width; half-- {
			r.free[half-1][offset+1<<(half-1)] = true
		}
		r.used += 1 << width
		return offset, nil
	}
	return 0, full("slots", r.size)
}

// lowest makes the choice a function of the history alone, so that dumps can
// be compared. There are few free runs of one length at a time.
func lowest(offsets map[uint32]bool) (uint32, bool) {
	found, least := false, uint32(0)
	for offset := range offsets {
		if !found || offset < least {
			found, least = true, offset
		}
	}
	return least, found
}

func (r *runs) give(offset, width uint32, now time.Time) {
	r.used -= 1 << width
	r.back = append(r.back, restingRun{offset, width, now})
}

func (r *runs) release(offset, width uint32) {
	for ; width < maxBits; width++ {
		buddy := offset ^ 1<<width
		if !r.free[width][buddy] {
			break
		}
		delete(r.free[width], buddy)
		offset &^= 1 << width
	}
	r.free[width][offset] = true
}
