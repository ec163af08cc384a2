// SPDX-License-Identifier: Apache-2.0

// Package maglev builds the consistent-hash lookup tables of Maglev (Eisenbud
// et al., NSDI 2016): weighted, with a power of two of slots and an odd skip,
// and deterministic from the set of backends alone.
package maglev

import (
	"encoding/binary"
	"math/bits"
	"slices"
)

// Key identifies a backend for as long as it is the same one. Equal keys have
// equal preferences on every node.
type Key [16]byte

// Backend is one backend of a table. Weight 0 gets no slot.
type Backend struct {
	Key    Key
	Weight uint32
}

// None is what every slot of a table holds when no backend has a weight.
const None = ^uint32(0)

// sizes that a table may have unless a policy fixes it: steps of four, so that
// it seldom changes, and half a step at the end.
var sizes = [...]uint32{256, 1024, 4096, 16384, 65536, 131072}

// SlotsPerBackend is how many a table has at least, unless a policy says
// otherwise: the more, the less changes hands beside what must.
const SlotsPerBackend = 100

// Size returns the number of slots of a table for so many backends: the
// smallest with at least SlotsPerBackend each, or the largest.
func Size(backends int) uint32 { return SizeFor(backends, SlotsPerBackend) }

// SizeFor is Size for another number of slots each.
func SizeFor(backends, slotsPerBackend int) uint32 {
	for _, size := range sizes {
		if uint64(backends)*uint64(slotsPerBackend) <= uint64(size) {
			return size
		}
	}
	return sizes[len(sizes)-1]
}

// Builder builds tables and keeps its memory from one to the next.
type Builder struct {
	walks   []walk
	sorted  []walk
	buckets []uint32
	taken   []uint64
	free    []uint32
	quotas  []quota
	turns   []uint32
}

// walk is a backend on its way through its permutation of the slots: it has
// been refused or has taken everything before next. A permutation is
// next, next+skip, next+2*skip, ... modulo the number of slots.
type walk struct {
	order  uint64 // of turns; a hash, so that no backend is first everywhere
	next   uint32
	skip   uint32 // odd, so the walk visits every slot
	index  uint32 // in the caller's backends
	weight uint32
}

// Build fills table, whose length is a power of two, with indices into
// backends. The result depends on the set of backends, not on their order;
// their keys must differ.
//
// Backends take turns, each time at the first slot of their permutation that
// is still free. A backend of half the weight of the heaviest has a turn in
// every second round. Each ends with its exact share, rounded up or down.
func (b *Builder) Build(table []uint32, backends []Backend) {
	if len(table) == 0 || len(table)&(len(table)-1) != 0 {
		panic("maglev: the length of a table is a power of two")
	}
	total, heaviest := b.start(backends, bits.TrailingZeros(uint(len(table))))
	if total == 0 {
		for i := range table {
			table[i] = None
		}
		return
	}
	b.taken = grow(b.taken, (len(table)+63)/64)
	clear(b.taken)
	f := filler{table: table, taken: b.taken, list: b.free[:0], left: len(table), few: fewFree(len(table))}
	if total == uint64(heaviest)*uint64(len(b.walks)) {
		f.equal(b.walks)
	} else {
		b.schedule(uint64(len(table)), total, uint64(heaviest))
		f.weighted(b.walks, b.quotas, b.turns)
	}
	b.free = f.list
}

// start puts every backend that has a weight at the beginning of its
// permutation, in the order of turns.
func (b *Builder) start(backends []Backend, log2 int) (total uint64, heaviest uint32) {
	b.walks = b.walks[:0]
	for i, backend := range backends {
		if backend.Weight == 0 {
			continue
		}
		offset, skip, order := hash(backend.Key)
		b.walks = append(b.walks, walk{
			order:  order,
			next:   uint32(offset >> (64 - log2)),
			skip:   uint32(skip>>(64-log2)) | 1,
			index:  uint32(i),
			weight: backend.Weight,
		})
		total += uint64(backend.Weight)
		heaviest = max(heaviest, backend.Weight)
	}
	b.sort()
	return total, heaviest
}

// hash returns three numbers that a key fixes: where its permutation starts,
// how far it skips, and when its turn is. Of the first two, the top bits count.
func hash(k Key) (offset, skip, order uint64) {
	const golden = 0x9e3779b97f4a7c15
	offset = mix(binary.LittleEndian.Uint64(k[:8]) + golden)
	offset = mix(offset ^ binary.LittleEndian.Uint64(k[8:]))
	skip = mix(offset + golden)
	return offset, skip, mix(skip + golden)
}

// mix is the finalizer of SplitMix64 (Steele et al., 2014): a bijection.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// sort orders the walks: by the top bits into about as many buckets as there
// are walks, which leaves little to the insertion sort after it.
func (b *Builder) sort() {
	n := len(b.walks)
	shift := 64 - bits.Len(uint(n))
	b.buckets = grow(b.buckets, 1<<(64-shift)+1)
	clear(b.buckets)
	for i := range b.walks {
		b.buckets[b.walks[i].order>>shift+1]++
	}
	for i := 1; i < len(b.buckets); i++ {
		b.buckets[i] += b.buckets[i-1]
	}
	b.sorted = grow(b.sorted, n)
	for i := range b.walks {
		at := &b.buckets[b.walks[i].order>>shift]
		b.sorted[*at] = b.walks[i]
		*at++
	}
	b.walks, b.sorted = b.sorted, b.walks
	for i := 1; i < n; i++ {
		for j := i; j > 0 && b.walks[j].order < b.walks[j-1].order; j-- {
			b.walks[j], b.walks[j-1] = b.walks[j-1], b.walks[j]
		}
	}
}

// quota is how many slots a backend surely gets, and how many it has.
type quota struct{ floor, has uint32 }

// schedule writes the turns of backends of unequal weight: turn k (from 0) of
// a backend is in round floor(k * heaviest / weight), and within a round they
// go in order. Rounds depend on no backend but the heaviest, so a backend that
// comes or goes disturbs no other's turns.
func (b *Builder) schedule(slots, total, heaviest uint64) {
	b.quotas = grow(b.quotas, len(b.walks))
	// No turn is later than this: k < slots*weight/total.
	rounds := slots*heaviest/total + 2
	b.buckets = grow(b.buckets, int(rounds)+1)
	clear(b.buckets)
	turns := uint64(0)
	for i := range b.walks {
		w := uint64(b.walks[i].weight)
		share := slots * w
		b.quotas[i] = quota{floor: uint32(share / total)}
		n := (share + total - 1) / total
		turns += n
		step, rest := heaviest/w, heaviest%w
		round, carry := uint64(0), uint64(0)
		for range n {
			b.buckets[round+1]++
			round, carry = advance(round, carry, step, rest, w)
		}
	}
	for i := 1; i < len(b.buckets); i++ {
		b.buckets[i] += b.buckets[i-1]
	}
	b.turns = grow(b.turns, int(turns))
	for i := range b.walks {
		w := uint64(b.walks[i].weight)
		step, rest := heaviest/w, heaviest%w
		round, carry := uint64(0), uint64(0)
		for range (slots*w + total - 1) / total {
			at := &b.buckets[round]
			b.turns[*at] = uint32(i)
			*at++
			round, carry = advance(round, carry, step, rest, w)
		}
	}
}

// advance adds heaviest/w, given as a whole number and a rest, to a round.
func advance(round, carry, step, rest, w uint64) (uint64, uint64) {
	round, carry = round+step, carry+rest
	if carry >= w {
		return round + 1, carry - w
	}
	return round, carry
}

func grow[T any](s []T, n int) []T { return slices.Grow(s[:0], n)[:n] }
