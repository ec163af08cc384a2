// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"math/bits"
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

// openGate writes what a service will ask of its clients' packets, before its
// word says that it does.
func (b *balancer) openGate(known *frontend, want lb.Frontend) error {
	if known.ranges == nil && len(want.SourceRanges) > 0 {
		known.ranges = map[netip.Prefix]bool{}
	}
	for _, p := range want.SourceRanges {
		if known.ranges[p] && !known.doubtful {
			continue
		}
		if err := b.maps.sourceRanges.Put(sourceKey(known.number, p), 1); err != nil {
			return err
		}
		if !known.ranges[p] {
			known.ranges[p] = true
			b.ranges++
		}
	}
	if want.Limits == (lb.Limits{}) || known.limited && !known.doubtful && want.Limits == known.applied.Limits {
		return nil
	}
	known.limited = true
	return b.maps.limits.Put(known.number, bpfServiceLimit{All: ratesOf(want.Limits.All), Client: ratesOf(want.Limits.PerClient)})
}

// closeGate removes what the service's word does not ask for any more.
func (b *balancer) closeGate(known *frontend, want lb.Frontend) error {
	if len(known.ranges) > len(want.SourceRanges) {
		wanted := make(map[netip.Prefix]bool, len(want.SourceRanges))
		for _, p := range want.SourceRanges {
			wanted[p] = true
		}
		for p := range known.ranges {
			if wanted[p] {
				continue
			}
			if err := b.maps.sourceRanges.Delete(sourceKey(known.number, p)); err != nil {
				return err
			}
			delete(known.ranges, p)
			b.ranges--
		}
	}
	if !known.limited || want.Limits != (lb.Limits{}) {
		return nil
	}
	if err := b.maps.limits.Delete(known.number); err != nil {
		return err
	}
	known.limited = false
	return nil
}

// verifyGates compares the maps with the plan.
func (b *balancer) verifyGates(plan lb.Plan) error {
	ranges, err := b.maps.sourceRanges.All()
	if err != nil {
		return err
	}
	limits, err := b.maps.limits.All()
	if err != nil {
		return err
	}
	wanted, limited := 0, 0
	for _, f := range plan.Frontends {
		number := b.frontends[f.ID].number
		for _, p := range f.SourceRanges {
			wanted++
			if _, ok := ranges[sourceKey(number, p)]; !ok {
				return fmt.Errorf("source_ranges: %s of %s is missing", p, f.ID)
			}
		}
		if f.Limits == (lb.Limits{}) {
			continue
		}
		limited++
		if l := limits[number]; l.All != ratesOf(f.Limits.All) || l.Client != ratesOf(f.Limits.PerClient) {
			return fmt.Errorf("service_limits: %s is missing or wrong", f.ID)
		}
	}
	if len(ranges) != wanted || len(limits) != limited {
		return fmt.Errorf("source_ranges and service_limits: %d and %d in the maps, %d and %d in the plan", len(ranges), len(limits), wanted, limited)
	}
	return nil
}

func sourceKey(service uint32, p netip.Prefix) bpfSourceKey {
	key := lbNodeKey(p)
	return bpfSourceKey{PrefixLen: 32 + key.PrefixLen, Service: bits.ReverseBytes32(service), Address: key.Address}
}

const (
	ticksShift    = 10
	rateCostShift = 10
	// rateBurst is how much of a second may come at once, and largestPacket what
	// always may.
	rateBurst     = 100 * time.Millisecond
	largestPacket = 65535
)

// ratesOf turns so much in a second into what a unit costs.
func ratesOf(r lb.Rate) (to bpfRates) {
	for kind, rate := range map[bpfRateKind]uint64{bpfRateKindRATE_CONNECTIONS: r.Connections, bpfRateKindRATE_PACKETS: r.Packets, bpfRateKindRATE_BITS: r.Bits} {
		if rate == 0 {
			continue
		}
		units := uint64(1)
		if kind == bpfRateKindRATE_BITS {
			units = 8 * largestPacket
		}
		to.Cost[kind] = (uint64(time.Second)<<(ticksShift+rateCostShift) + rate/2) / rate
		to.Burst[kind] = max(uint64(rateBurst)<<ticksShift, units*to.Cost[kind]>>rateCostShift)
	}
	return to
}
