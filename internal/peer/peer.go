// SPDX-License-Identifier: Apache-2.0

// Package peer asks the agents of backends' nodes which flows their backends
// own, and answers such questions: over TLS 1.3, both sides authenticated.
package peer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"

	"fairlead.dev/fairlead/internal/lb"
)

// The bounds on one request.
const (
	MinBits      = 6 // 64 slots: one word
	MaxBits      = 17
	maxQuestions = 20_000
	maxTargets   = 100_000
	maxBody      = 8 << 20
	maxAnswer    = 64 << 20
	MaxRecords   = 20_000
)

// Question is about one frontend: which of its slots these targets, of the node
// that is asked, own flows in. There are 1<<Bits slots.
type Question struct {
	Frontend netip.AddrPort   `json:"frontend"`
	Protocol lb.Protocol      `json:"protocol"`
	Bits     uint8            `json:"bits"`
	Targets  []netip.AddrPort `json:"targets"`
}

// Answer is about one target: how many flows it owns of the frontend, and in
// which slots, as a bitmap.
type Answer struct {
	Flows uint32
	Owns  []uint64
}

// Record is a flow, by its hash, that an LB node gave to a backend while the
// slot was contested and nobody could be asked.
type Record struct {
	Hash   uint64         `json:"hash"`
	Target netip.AddrPort `json:"target"`
}

// Verdict is what an LB node's probes say of a backend.
type Verdict struct {
	Namespace string         `json:"namespace"`
	Name      string         `json:"name"`
	Target    netip.AddrPort `json:"target"`
	Protocol  lb.Protocol    `json:"protocol"`
	Healthy   bool           `json:"healthy"`
	Problem   string         `json:"problem,omitempty"`
}

// check refuses what would cost too much to answer.
func check(questions []Question) error {
	targets := 0
	if len(questions) > maxQuestions {
		return fmt.Errorf("%d questions in one request, %d are the most", len(questions), maxQuestions)
	}
	for _, q := range questions {
		if q.Bits < MinBits || q.Bits > MaxBits {
			return fmt.Errorf("a question about 1<<%d slots; from 1<<%d to 1<<%d are possible", q.Bits, MinBits, MaxBits)
		}
		if targets += len(q.Targets); targets > maxTargets {
			return fmt.Errorf("more than %d targets in one request", maxTargets)
		}
	}
	return nil
}

// An answer is written as the number of flows, and of slots with flows; then
// the slots as differences, or when that is longer, the bitmap's words. All
// numbers are varints but the words, which are little-endian.
func (a Answer) append(b []byte) []byte {
	set := 0
	for _, word := range a.Owns {
		set += bits.OnesCount64(word)
	}
	b = binary.AppendUvarint(b, uint64(a.Flows))
	b = binary.AppendUvarint(b, uint64(set))
	if set > len(a.Owns)*4 {
		for _, word := range a.Owns {
			b = binary.LittleEndian.AppendUint64(b, word)
		}
		return b
	}
	last := 0
	for i, word := range a.Owns {
		for ; word != 0; word &= word - 1 {
			at := 64*i + bits.TrailingZeros64(word)
			b = binary.AppendUvarint(b, uint64(at-last))
			last = at
		}
	}
	return b
}

var errAnswer = errors.New("the answer is cut off or nonsense")

// readAnswer is the inverse of append; rest is what follows.
func readAnswer(b []byte, width uint8) (a Answer, rest []byte, err error) {
	number := func() int {
		v, n := binary.Uvarint(b)
		if n <= 0 || v > 1<<32 {
			err = errAnswer
			return 0
		}
		b = b[n:]
		return int(v)
	}
	a.Flows = uint32(number())
	set := number()
	a.Owns = make([]uint64, 1<<(width-6))
	if set > len(a.Owns)*4 {
		if len(b) < 8*len(a.Owns) {
			return a, nil, errAnswer
		}
		for i := range a.Owns {
			a.Owns[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		return a, b[8*len(a.Owns):], err
	}
	at := 0
	for range set {
		if at += number(); err != nil || at >= 64*len(a.Owns) {
			return a, nil, errAnswer
		}
		a.Owns[at/64] |= 1 << (at % 64)
	}
	return a, b, err
}

func encode(answers [][]Answer) []byte {
	var b []byte
	for _, of := range answers {
		for _, a := range of {
			b = a.append(b)
		}
	}
	return b
}

func decode(b []byte, questions []Question) ([][]Answer, error) {
	answers := make([][]Answer, len(questions))
	for i, q := range questions {
		answers[i] = make([]Answer, len(q.Targets))
		for j := range q.Targets {
			var err error
			if answers[i][j], b, err = readAnswer(b, q.Bits); err != nil {
				return nil, err
			}
		}
	}
	if len(b) > 0 {
		return nil, errAnswer
	}
	return answers, nil
}
