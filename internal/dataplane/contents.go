// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"sync/atomic"
)

// hashMap is what is asked of a BPF map that is not memory-mapped. The real
// one is kernelMap; tests have one that fails now and then.
type hashMap[K comparable, V any] interface {
	Put(K, V) error
	Delete(K) error // no error when there is none
	All() (map[K]V, error)
}

// contents is what the maps of one dataplane hold. The arrays are the mapped
// memory itself (in tests, plain slices).
type contents struct {
	serviceWords []uint64
	slots        []uint64
	candidates   []bpfCandidateRow
	denials      []uint64 // in settled slots, by service
	vipBits      []uint64
	backends     []bpfBackend
	nextHops     []bpfNextHop

	services hashMap[bpfServiceKey, uint32]
	pods     hashMap[bpfPodKey, bpfPod]
	lbNodes  hashMap[bpfLbNodeKey, uint32]
	floods   hashMap[bpfPodKey, bpfFlood]

	sourceRanges hashMap[bpfSourceKey, uint32]
	limits       hashMap[uint32, bpfServiceLimit]

	// purge removes the flows, confirmed or not, of the Pods that f says; nil
	// where there are none.
	purge func(f func(bpfPodKey) bool) error

	mapped [][]byte // the memory behind the arrays

	wrote func() // nil but in tests: called after each word that was changed
}

// store writes a word that packets may be reading at this moment.
func (c *contents) store(word *uint64, value uint64) {
	if atomic.LoadUint64(word) == value {
		return
	}
	atomic.StoreUint64(word, value)
	if c.wrote != nil {
		c.wrote()
	}
}

// storeBackend writes a row that no slot names yet.
func (c *contents) storeBackend(number uint32, row bpfBackend, word uint64) {
	to := &c.backends[number]
	row.Word = atomic.LoadUint64(&to.Word)
	*to = row
	c.store(&to.Word, word)
}
