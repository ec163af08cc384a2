// SPDX-License-Identifier: Apache-2.0

package maglev

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"math/rand/v2"
	"slices"
	"testing"
)

// naive is the pseudo-code of the paper, section 3.4: whole permutations, one
// turn after the other, every slot on the way looked at. A turn is due in the
// first round in which a backend's part of the rounds so far exceeds what it
// has, and nobody has more than its share rounded up.
func naive(backends []Backend, size int, permutation func(Key, int) []int) []uint32 {
	n := len(backends)
	order := make([]int, n)
	permutations := make([][]int, n)
	total, heaviest := uint64(0), uint64(0)
	for i, b := range backends {
		order[i] = i
		permutations[i] = permutation(b.Key, size)
		total += uint64(b.Weight)
		heaviest = max(heaviest, uint64(b.Weight))
	}
	slices.SortFunc(order, func(a, b int) int {
		_, _, x := hash(backends[a].Key)
		_, _, y := hash(backends[b].Key)
		return cmp.Compare(x, y)
	})
	extra := size
	for _, b := range backends {
		extra -= int(uint64(size) * uint64(b.Weight) / total)
	}
	entry := make([]uint32, size)
	for i := range entry {
		entry[i] = None
	}
	next, has := make([]int, n), make([]int, n)
	filled := 0
	for round := uint64(0); ; round++ {
		for _, i := range order {
			w := uint64(backends[i].Weight)
			if (round+1)*w <= uint64(has[i])*heaviest {
				continue
			}
			switch share := int(uint64(size) * w / total); {
			case has[i] > share, has[i] == share && (extra == 0 || uint64(size)*w%total == 0):
				continue
			case has[i] == share:
				extra--
			}
			c := permutations[i][next[i]]
			for entry[c] != None {
				next[i]++
				c = permutations[i][next[i]]
			}
			entry[c] = uint32(i)
			next[i]++
			has[i]++
			if filled++; filled == size {
				return entry
			}
		}
	}
}

// powerOfTwo is the permutation of this package.
func powerOfTwo(k Key, size int) []int {
	log2 := bits.TrailingZeros(uint(size))
	offset, skip, _ := hash(k)
	return walkAll(int(offset>>(64-log2)), int(skip>>(64-log2))|1, size)
}

// prime is the permutation of the paper.
func prime(k Key, size int) []int {
	offset, skip, _ := hash(k)
	return walkAll(int(offset%uint64(size)), int(skip%uint64(size-1))+1, size)
}

func walkAll(at, skip, size int) []int {
	permutation := make([]int, size)
	for j := range permutation {
		permutation[j] = (at + j*skip) % size
	}
	return permutation
}

// TestBuildNaive compares with the naive tables.
func TestBuildNaive(t *testing.T) {
	var b Builder // one for all: what a build leaves must not reach the next
	for _, size := range []int{1, 2, 16, 64, 256, 1024, 4096} {
		for _, n := range []int{1, 2, 3, 7, 10, 39, 256, 300} {
			for name, backends := range map[string][]Backend{
				"equal": some(n, 1), "mixed": some(n, 10), "wild": some(n, math.MaxUint32),
			} {
				got := make([]uint32, size)
				b.Build(got, backends)
				if want := naive(backends, size, powerOfTwo); !slices.Equal(got, want) {
					t.Errorf("%d slots, %d backends of %s weight: not the naive table", size, n, name)
				}
			}
		}
	}
}

// TestBuildSet shuffles the backends, and adds some of no weight.
func TestBuildSet(t *testing.T) {
	backends := some(100, 10)
	want := owners(build(backends, 1024), backends)
	r := rand.New(rand.NewPCG(2, 2))
	for range 10 {
		shuffled := slices.Clone(backends)
		shuffled = append(shuffled, Backend{Key: Key{1}}, Backend{Key: Key{2}})
		r.Shuffle(len(shuffled), func(i, j int) {
			shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
		})
		if got := owners(build(shuffled, 1024), shuffled); !slices.Equal(got, want) {
			t.Fatal("the table depends on the order of the backends, or on one without weight")
		}
	}
}

// TestBuildNone: without weights, no slot has a backend.
func TestBuildNone(t *testing.T) {
	for _, backends := range [][]Backend{nil, {{Key: Key{1}}, {Key: Key{2}}}} {
		for _, got := range build(backends, 256) {
			if got != None {
				t.Fatalf("%d backends without weight: slot of backend %d", len(backends), got)
			}
		}
	}
}

// TestBuildShare: each backend has its share within one slot, so within the 2%
// or one slot that is promised.
func TestBuildShare(t *testing.T) {
	for _, n := range []int{1, 3, 10, 100, 655, 1310, 5000} {
		for _, weight := range []uint32{1, 10, 1000, math.MaxUint32} {
			backends := some(n, weight)
			size, total := int(Size(n)), 0.0
			for _, b := range backends {
				total += float64(b.Weight)
			}
			has := make([]int, n)
			for _, i := range build(backends, size) {
				has[i]++
			}
			for i, b := range backends {
				want := float64(size) * float64(b.Weight) / total
				if math.Abs(float64(has[i])-want) > 1 {
					t.Errorf("%d backends of weight up to %d: one has %d slots, not %.1f", n, weight, has[i], want)
				}
			}
		}
	}
}

// TestBuildPrime compares balance and disruption with tables whose size is the
// prime just below a power of two, built by the naive code.
func TestBuildPrime(t *testing.T) {
	type shape struct{ n, size, prime int }
	shapes := []shape{{10, 1024, 1021}, {39, 4096, 4093}, {100, 16384, 16381}, {655, 65536, 65521}}
	for _, s := range shapes {
		backends := some(s.n, 1)
		odd := func(b []Backend) []uint32 { return build(b, s.size) }
		primal := func(b []Backend) []uint32 { return naive(b, s.prime, prime) }
		mine, his := spread(odd(backends)), spread(primal(backends))
		leaves, hisLeaves := leave(backends, odd, 10), leave(backends, primal, 10)
		t.Logf("%4d backends, %5d slots: most/mean %.4f (prime: %.4f); moved/ideal when one leaves or joins %.3f (prime: %.3f)",
			s.n, s.size, mine, his, leaves, hisLeaves)
		if mine > his+0.01 {
			t.Errorf("%d backends: most/mean is %.4f, with a prime %.4f", s.n, mine, his)
		}
		// The means of ten removals scatter by a tenth or so.
		if leaves > hisLeaves*1.15 {
			t.Errorf("%d backends: %.3f of the ideal move, with a prime %.3f", s.n, leaves, hisLeaves)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int]uint32{
		0: 256, 1: 256, 2: 256, 3: 1024, 10: 1024, 11: 4096, 40: 4096, 41: 16384,
		163: 16384, 164: 65536, 655: 65536, 656: 131072, 5000: 131072, 50000: 131072,
	} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) is %d, not %d", n, got, want)
		}
	}
}

// TestBuildAllocates nothing the second time.
func TestBuildAllocates(t *testing.T) {
	for _, weight := range []uint32{1, 10} {
		backends, table := some(100, weight), make([]uint32, 16384)
		var b Builder
		b.Build(table, backends)
		if n := testing.AllocsPerRun(5, func() { b.Build(table, backends) }); n != 0 {
			t.Errorf("weights up to %d: %.0f allocations a build", weight, n)
		}
	}
}

// BenchmarkBuild measures the time of one build, and counts the slots that
// move when one backend leaves, as a multiple of the fewest possible.
func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{10, 100, 1000, 5000} {
		for weights, heaviest := range map[string]uint32{"equal": 1, "mixed": 10} {
			for size := Size(n); size >= 65536 && size >= Size(n)/2 || size == Size(n); size /= 2 {
				b.Run(fmt.Sprintf("weights=%s/slots=%d/backends=%d", weights, size, n), func(b *testing.B) {
					backends, table := some(n, heaviest), make([]uint32, size)
					var builder Builder
					builder.Build(table, backends)
					b.ReportAllocs()
					for b.Loop() {
						builder.Build(table, backends)
					}
					moved := leave(backends, func(b []Backend) []uint32 { return build(b, len(table)) }, 4)
					b.ReportMetric(moved, "moved/ideal")
				})
			}
		}
	}
}

// some returns n backends with weights of 1 to heaviest, the same in every run.
func some(n int, heaviest uint32) []Backend {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	backends := make([]Backend, n)
	for i := range backends {
		for j := range backends[i].Key {
			backends[i].Key[j] = byte(r.Uint32())
		}
		backends[i].Weight = 1 + r.Uint32N(heaviest)
	}
	return backends
}

func build(backends []Backend, size int) []uint32 {
	table := make([]uint32, size)
	new(Builder).Build(table, backends)
	return table
}

// owners translates indices to keys, so that tables of different sets compare.
func owners(table []uint32, backends []Backend) []Key {
	keys := make([]Key, len(table))
	for i, backend := range table {
		keys[i] = backends[backend].Key
	}
	return keys
}

// spread returns the most slots that any backend has, over the mean.
func spread(table []uint32) float64 {
	has := map[uint32]int{}
	most := 0
	for _, b := range table {
		has[b]++
		most = max(most, has[b])
	}
	return float64(most) * float64(len(has)) / float64(len(table))
}

// leave takes some backends away, each in turn, and returns the mean number of
// slots that moved, as a multiple of those that had to: the ones it had. A
// backend that joins is the same the other way round.
func leave(backends []Backend, build func([]Backend) []uint32, times int) float64 {
	before := owners(build(backends), backends)
	sum := 0.0
	for i := range times {
		gone := i * len(backends) / times
		fewer := slices.Delete(slices.Clone(backends), gone, gone+1)
		after := owners(build(fewer), fewer)
		moved, had := 0, 0
		for s := range before {
			if before[s] != after[s] {
				moved++
			}
			if before[s] == backends[gone].Key {
				had++
			}
		}
		sum += float64(moved) / float64(had)
	}
	return sum / float64(times)
}
