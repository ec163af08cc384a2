// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"net/netip"
	"time"

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
// Flows that are not confirmed yet count as owned too.
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
	note := func(confirmed uint32) func(bpfFlowKey, *bpfFlow) {
		return func(key bpfFlowKey, flow *bpfFlow) {
			if bpfFlowFin(flow.Fins)&bpfFlowFinFLOW_CLOSED != 0 || flow.State == 0 {
				return
			}
			k := owner{netip.AddrPortFrom(addrOf(key.Vip), swap16(key.VipPort)), netip.AddrPortFrom(addrOf(flow.Pod), swap16(flow.PodPort)), lb.Protocol(key.Proto)}
			if last == nil || k != lastKey {
				if lastKey, last = k, o.of[k]; last == nil {
					last = &owned{}
					o.of[k] = last
				}
			}
			last.flows += confirmed
			last.prefixes = append(last.prefixes, uint32(flow.Hash>>(64-maxBits)))
		}
	}
	if err := eachFlow(d.loaded.Flows, note(1)); err != nil {
		return nil, err
	}
	if err := eachFlow(d.loaded.Pending, note(0)); err != nil {
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
