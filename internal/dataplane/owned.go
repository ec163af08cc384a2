// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// OwnedAge is how old an Ownership may be.
const OwnedAge = time.Second

// Ownership is which flows this node's Pods own, at one moment.
type Ownership struct {
	taken time.Time
	of    map[owner]*owned
}

type owner struct {
	frontend, target netip.AddrPort
	protocol         lb.Protocol
}

type owned struct {
	flows    uint32   // confirmed
	prefixes []uint32 // of the hashes: maxBits bits each, in no order
}

// Owned reads the tables of flows, at most once in OwnedAge, however many ask.
// Flows that are not confirmed yet count as owned too, and so do clients that
// affinity keeps.
func (d *Dataplane) Owned() (*Ownership, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil, ErrNotLoaded
	}
	now := d.now()
	if d.ownership != nil && now.Sub(d.ownership.taken) < OwnedAge {
		return d.ownership, nil
	}
	o := &Ownership{taken: now, of: map[owner]*owned{}}
	var last *owned
	var lastKey owner
	add := func(key bpfFlowKey, pod bpfAddr, port uint16, hash uint64, flows uint32) {
		k := owner{netip.AddrPortFrom(addrOf(key.Vip), swap16(key.VipPort)), netip.AddrPortFrom(addrOf(pod), swap16(port)), lb.Protocol(key.Proto)}
		if last == nil || k != lastKey {
			if lastKey, last = k, o.of[k]; last == nil {
				last = &owned{}
				o.of[k] = last
			}
		}
		last.flows += flows
		last.prefixes = append(last.prefixes, uint32(hash>>(64-maxBits)))
	}
	note := func(confirmed uint32) func(bpfFlowKey, *bpfFlow) {
		return func(key bpfFlowKey, flow *bpfFlow) {
			if bpfFlowFin(flow.Fins)&bpfFlowFinFLOW_CLOSED == 0 && flow.State != 0 && flow.Hash != 0 { // 0: a health check's
				add(key, flow.Pod, flow.PodPort, flow.Hash, confirmed)
			}
		}
	}
	if err := eachFlow(d.loaded.Flows, note(1)); err != nil {
		return nil, err
	}
	if err := eachFlow(d.loaded.Pending, note(0)); err != nil {
		return nil, err
	}
	var clock unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &clock); err != nil {
		return nil, fmt.Errorf("read the clock: %w", err)
	}
	err := eachFlow(d.loaded.Affinities, func(key bpfFlowKey, a *bpfAffinity) {
		if d.receiver.keeps(key, a, uint64(clock.Nano())) {
			add(key, a.Pod, a.PodPort, a.Hash, 0)
		}
	})
	if err != nil {
		return nil, err
	}
	d.ownership = o
	return o, nil
}

// Slots returns how many flows of a frontend a target owns, and in which of
// 1<<width slots, as a bitmap.
func (o *Ownership) Slots(frontend netip.AddrPort, protocol lb.Protocol, target netip.AddrPort, width uint8) (flows uint32, bitmap []uint64) {
	bitmap = make([]uint64, 1<<(width-6))
	of := o.of[owner{frontend, target, protocol}]
	if of == nil {
		return 0, bitmap
	}
	for _, prefix := range of.prefixes {
		at := prefix >> (maxBits - width)
		bitmap[at/64] |= 1 << (at % 64)
	}
	return of.flows, bitmap
}
