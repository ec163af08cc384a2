// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"cmp"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
	"fairlead.dev/fairlead/internal/slots"
)

// balancer makes the maps of role lb match a plan. It remembers what it wrote,
// and changes only what differs.
//
// Order, so that a packet never meets half of a change: next hops, then
// backends, then slots, then the service's word, then the key that leads to
// it; removal goes the other way. A backend that is gone is marked so first.
type balancer struct {
	maps *contents
	tag  func(node string) [8]byte

	serviceNumbers, backendNumbers, hopNumbers, rowNumbers *numbers
	runs                                                   *runs

	// suspicious: whoever never said what it owns is a candidate everywhere.
	suspicious bool
	// forgetful: nobody is ever a candidate.
	forgetful bool
	// adopted is what the program that is still attached forwards by.
	adopted adopted

	frontends map[lb.FrontendID]*frontend
	rows      map[slots.List]*candidateRow
	backends  map[lb.BackendID]*backend
	hops      map[lb.NextHop]*hop
	vips      map[netip.Addr]int // frontends of each
	bits      map[uint64]int     // VIPs of each bit of vip_bits

	ranges     int // of all frontends
	rangesMost int
	generation uint32
	builder    maglev.Builder
	indexes    []uint32
}

type frontend struct {
	number       uint32
	offset, bits uint32 // its run of slots; bits 0: none
	applied      lb.Frontend
	published    bool // its key is in services
	doubtful     bool // somebody else wrote to the maps: write all of it again
	ranges       map[netip.Prefix]bool
	limited      bool // it is in service_limits
	sum          uint64

	table    slots.Table
	rows     map[slots.List]bool // of candidates, that its slots name
	answered map[lb.BackendID]bool
	unknown  bool // a backend has never answered
	changed  time.Time
	moved    float64 // share of the flow hashes whose backend changed then
	denials  uint64  // in settled slots, when they were last looked at
}

type backend struct {
	number     uint32
	generation uint32
	hop        *hop
	doubtful   bool
}

type hop struct {
	row   uint32
	users int
}

func newBalancer(maps *contents, limits Limits, tag func(string) [8]byte) *balancer {
	return &balancer{
		maps: maps, tag: tag,
		serviceNumbers: newNumbers("services", limits.Services),
		backendNumbers: newNumbers("backends", limits.Backends),
		hopNumbers:     newNumbers("nextHops", limits.NextHops),
		rowNumbers:     newNumbers("candidates", limits.Candidates),
		rows:           map[slots.List]*candidateRow{},
		runs:           newRuns(limits.Slots),
		rangesMost:     limits.SourceRanges,
		frontends:      map[lb.FrontendID]*frontend{},
		backends:       map[lb.BackendID]*backend{},
		hops:           map[lb.NextHop]*hop{},
		vips:           map[netip.Addr]int{},
		bits:           map[uint64]int{},
	}
}

// set applies the difference. After an error the same call goes on where it
// stopped.
func (b *balancer) set(plan lb.Plan, hops map[netip.Addr]lb.NextHop, now time.Time) error {
	wanted, err := b.wanted(plan)
	if err != nil {
		return err
	}
	for id, known := range b.backends {
		if _, ok := wanted[id]; !ok {
			b.maps.store(&b.maps.backends[known.number].Word, backendWord(bpfBackendStateBACKEND_GONE, known.generation, 0))
		}
	}
	for _, id := range sortedBackends(wanted) {
		if err := b.setBackend(wanted[id], hops, now); err != nil {
			return err
		}
	}
	keep := make(map[lb.FrontendID]bool, len(plan.Frontends))
	for _, f := range plan.Frontends {
		keep[f.ID] = true
		if err := b.setFrontend(f, now); err != nil {
			return fmt.Errorf("program %s of Service %s: %w", f.ID, f.Service, err)
		}
	}
	for id, known := range b.frontends {
		if !keep[id] {
			if err := b.removeFrontend(id, known, now); err != nil {
				return fmt.Errorf("remove %s: %w", id, err)
			}
		}
	}
	b.forgetBackends(wanted, now)
	return nil
}

// wanted collects the backends of all frontends and refuses, before anything
// is written, what does not fit or must not be reached.
func (b *balancer) wanted(plan lb.Plan) (map[lb.BackendID]lb.Backend, error) {
	wanted := map[lb.BackendID]lb.Backend{}
	slots, ranges, vips := uint64(0), uint64(0), map[netip.Addr]bool{}
	for _, f := range plan.Frontends {
		vips[f.ID.VIP] = true
	}
	for _, f := range plan.Frontends {
		if f.TableSize&(f.TableSize-1) != 0 || f.TableSize > 1<<maxBits {
			return nil, fmt.Errorf("refuse Service %s: table size %d is no power of two up to %d", f.Service, f.TableSize, 1<<maxBits)
		}
		slots, ranges = slots+uint64(f.TableSize), ranges+uint64(len(f.SourceRanges))
		for _, backend := range f.Backends {
			if err := checkBackend(f, backend.ID, vips); err != nil {
				return nil, err
			}
			// The most alive state that any frontend gives it counts.
			if known, ok := wanted[backend.ID]; !ok || backend.State < known.State {
				wanted[backend.ID] = backend
			}
		}
	}
	for _, limit := range []struct {
		name       string
		need, size uint64
	}{
		{"services", uint64(len(plan.Frontends)), uint64(b.serviceNumbers.size) - 1},
		{"backends", uint64(len(wanted)), uint64(b.backendNumbers.size) - 1},
		{"slots", slots, uint64(b.runs.size)},
		{"sourceRanges", ranges, uint64(b.rangesMost)},
	} {
		if limit.need > limit.size {
			return nil, fmt.Errorf("the plan of node %s needs %d %s and there are %d; raise limits.%s in the agent's configuration and restart it",
				plan.Node, limit.need, limit.name, limit.size, limit.name)
		}
	}
	return wanted, nil
}

// checkBackend refuses what would turn the balancer against its own network,
// whatever the source of the plan let through.
func checkBackend(f lb.Frontend, id lb.BackendID, vips map[netip.Addr]bool) error {
	target := id.Target.Addr()
	why := lb.Unusable(target)
	if why == "" && vips[target] {
		why = "is a VIP"
	}
	if why == "" && id.Mode != lb.ModeLocal {
		if !id.Tunnel.IsValid() {
			why = "has no tunnel address"
		} else if unusable := lb.Unusable(id.Tunnel); unusable != "" {
			why = "its node's tunnel address " + id.Tunnel.String() + " " + unusable
		} else if vips[id.Tunnel] {
			why = "its node's tunnel address " + id.Tunnel.String() + " is a VIP"
		}
	}
	if why != "" {
		return fmt.Errorf("refuse Service %s: backend %s: %s; correct the EndpointSlice or the Node", f.Service, id.Target, why)
	}
	return nil
}

func sortedBackends(of map[lb.BackendID]lb.Backend) []lb.BackendID {
	ids := make([]lb.BackendID, 0, len(of))
	for id := range of {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, compareBackends)
	return ids
}

func compareBackends(a, b lb.BackendID) int {
	return cmp.Or(a.Target.Compare(b.Target), a.Tunnel.Compare(b.Tunnel), cmp.Compare(a.Mode, b.Mode),
		cmp.Compare(a.UID, b.UID), a.Local.Compare(b.Local))
}

func (b *balancer) setBackend(want lb.Backend, hops map[netip.Addr]lb.NextHop, now time.Time) error {
	known, ok := b.backends[want.ID]
	if !ok {
		number, err := b.backendNumbers.take(now)
		if err != nil {
			return fmt.Errorf("program backend %s: %w", want.ID.Target, err)
		}
		b.generation++
		known = &backend{number: number, generation: b.generation}
		b.backends[want.ID] = known
		known.doubtful = true
	}
	if known.doubtful {
		b.maps.storeBackend(known.number, backendRow(want, b.tag(want.Node)), backendWord(bpfBackendStateBACKEND_UNUSED, known.generation, 0))
		known.doubtful = false
	}
	old := known.hop
	next, err := b.useHop(hops, want.ID, now)
	if err != nil {
		return err
	}
	known.hop = next
	b.maps.store(&b.maps.backends[known.number].Word, b.wordOf(want, known))
	b.dropHop(old, now)
	return nil
}

func (b *balancer) wordOf(want lb.Backend, known *backend) uint64 {
	state, row := bpfBackendStateBACKEND_ACTIVE, uint32(0)
	switch want.State {
	case lb.Draining:
		state = bpfBackendStateBACKEND_DRAINING
	case lb.Failing:
		state = bpfBackendStateBACKEND_FAILING
	}
	if known.hop != nil {
		row = known.hop.row
	}
	return backendWord(state, known.generation, row)
}

// useHop returns the row of the next hop to a backend, or nil while there is
// none: then the program asks the kernel's FIB for each packet.
func (b *balancer) useHop(hops map[netip.Addr]lb.NextHop, id lb.BackendID, now time.Time) (*hop, error) {
	want, ok := hops[id.Tunnel]
	if !ok || id.Mode == lb.ModeLocal {
		return nil, nil
	}
	known := b.hops[want]
	if known == nil {
		row, err := b.hopNumbers.take(now)
		if err != nil {
			return nil, fmt.Errorf("program the next hop to %s: %w", id.Tunnel, err)
		}
		b.maps.nextHops[row] = hopRow(want)
		known = &hop{row: row}
		b.hops[want] = known
	}
	known.users++
	return known, nil
}

func hopRow(h lb.NextHop) bpfNextHop {
	return bpfNextHop{Ifindex: uint32(h.Interface), DstMac: h.Target, SrcMac: h.Source, Vlan: swap16(h.VLAN), Mtu: h.MTU}
}

func (b *balancer) dropHop(old *hop, now time.Time) {
	if old == nil {
		return
	}
	if old.users--; old.users > 0 {
		return
	}
	for want, known := range b.hops {
		if known == old {
			delete(b.hops, want)
			b.hopNumbers.give(old.row, now)
		}
	}
}

func (b *balancer) setFrontend(want lb.Frontend, now time.Time) error {
	known := b.frontends[want.ID]
	if known == nil {
		number, err := b.serviceNumbers.take(now)
		if err != nil {
			return err
		}
		known = &frontend{number: number, rows: map[slots.List]bool{}, answered: map[lb.BackendID]bool{}}
		b.frontends[want.ID] = known
		b.adopt(known, want, now)
	}
	if err := b.openGate(known, want); err != nil {
		return err
	}
	if known.published && !known.doubtful && sameSlots(known.applied, want) {
		b.maps.store(&b.maps.serviceWords[known.number], serviceWord(known.offset, known.bits, want))
	} else if err := b.setSlots(known, want, now); err != nil {
		return err
	}
	known.applied = want
	if err := b.closeGate(known, want); err != nil {
		return err
	}
	return b.publish(known, want.ID)
}

// sameSlots reports whether two states of a frontend have the same table.
func sameSlots(a, b lb.Frontend) bool {
	return a.TableSize == b.TableSize && a.Mode == b.Mode && slices.Equal(a.Backends, b.Backends)
}

// setSlots makes the table: in place, slot by slot, while its size stays, and
// in a new run that the service's word then points to when it does not.
func (b *balancer) setSlots(known *frontend, want lb.Frontend, now time.Time) error {
	owners, alive := b.owners(known, want)
	width := uint32(0)
	if len(owners) > 0 {
		width = uint32(bits.TrailingZeros(uint(len(owners))))
	}
	offset, oldOffset, oldBits := known.offset, known.offset, known.bits
	if width != oldBits && width > 0 {
		var err error
		if offset, err = b.runs.take(width, now); err != nil {
			return err
		}
	}
	known.moved = moved(&known.table, owners)
	if b.forgetful {
		known.table = slots.Table{}
	}
	known.table.Change(owners, func(number uint32) bool { return number != 0 && !alive[number] }, now)
	b.suspect(known, want)
	known.offset, known.bits, known.changed = offset, width, now
	err := b.writeSlots(known, now)
	b.maps.store(&b.maps.serviceWords[known.number], serviceWord(offset, width, want))
	if width != oldBits && oldBits > 0 {
		b.runs.give(oldOffset, oldBits, now)
	}
	return err
}

// moved is the share of the flow hashes that others would get than have them.
func moved(table *slots.Table, owners []uint32) float64 {
	before, after := uint32(table.Len()), uint32(len(owners))
	if before == 0 || after == 0 {
		return 0
	}
	steps, n := max(before, after), 0
	for step := range steps {
		if table.Owner(at(step, steps, before)) != owners[at(step, steps, after)] {
			n++
		}
	}
	return float64(n) / float64(steps)
}

// owners are the numbers of the slots' backends, and of all that are alive.
// When there is nobody for new flows, the slots stay, for those who have older
// ones.
func (b *balancer) owners(known *frontend, want lb.Frontend) ([]uint32, map[uint32]bool) {
	alive := make(map[uint32]bool, len(want.Backends))
	for _, backend := range want.Backends {
		alive[b.backends[backend.ID].number] = true
	}
	active, ids := takers(want)
	if len(active) == 0 {
		if len(alive) == 0 {
			return nil, alive
		}
		return make([]uint32, cmp.Or(known.table.Len(), int(want.TableSize))), alive
	}
	numbers := make([]uint32, len(ids))
	for i, id := range ids {
		numbers[i] = b.backends[id].number
	}
	b.indexes = slices.Grow(b.indexes[:0], int(want.TableSize))[:want.TableSize]
	b.builder.Build(b.indexes, active)
	owners := make([]uint32, want.TableSize)
	for slot, index := range b.indexes {
		owners[slot] = numbers[index]
	}
	return owners, alive
}

// takers are the backends of a frontend that take new flows, as its table is
// built of them, and who they are.
func takers(f lb.Frontend) (active []maglev.Backend, ids []lb.BackendID) {
	for _, backend := range f.Backends {
		if backend.State == lb.Active && backend.Weight > 0 {
			active = append(active, maglev.Backend{Key: backendKey(backend.ID.Target), Weight: backend.Weight})
			ids = append(ids, backend.ID)
		}
	}
	return active, ids
}

// checksum is FNV-1a over words, to notice slots that are not what was written.
func checksum(run []uint64) uint64 {
	sum := uint64(14695981039346656037)
	for _, word := range run {
		sum = (sum ^ word) * 1099511628211
	}
	return sum
}

func (b *balancer) publish(known *frontend, id lb.FrontendID) error {
	if known.published && !known.doubtful {
		return nil
	}
	word, mask := vipBit(id.VIP)
	b.maps.store(&b.maps.vipBits[word], b.maps.vipBits[word]|mask)
	if err := b.maps.services.Put(vipKey(id.VIP), serviceNone); err != nil {
		return err
	}
	if err := b.maps.services.Put(serviceKey(id), known.number); err != nil {
		return err
	}
	known.doubtful = false
	if known.published {
		return nil
	}
	known.published = true
	if b.vips[id.VIP]++; b.vips[id.VIP] == 1 {
		b.bits[bitOf(word, mask)]++
	}
	return nil
}

func bitOf(word uint32, mask uint64) uint64 {
	return uint64(word)<<6 | uint64(bits.TrailingZeros64(mask))
}

func (b *balancer) removeFrontend(id lb.FrontendID, known *frontend, now time.Time) error {
	if err := b.maps.services.Delete(serviceKey(id)); err != nil {
		return err
	}
	if known.published {
		if b.vips[id.VIP] == 1 {
			if err := b.maps.services.Delete(vipKey(id.VIP)); err != nil {
				return err
			}
			b.forgetVIP(id.VIP)
		} else {
			b.vips[id.VIP]--
		}
		known.published = false
	}
	b.maps.store(&b.maps.serviceWords[known.number], 0)
	if err := b.closeGate(known, lb.Frontend{}); err != nil {
		return err
	}
	for list := range known.rows {
		b.dropRow(list, now)
	}
	b.serviceNumbers.give(known.number, now)
	if known.bits > 0 {
		b.runs.give(known.offset, known.bits, now)
	}
	delete(b.frontends, id)
	return nil
}

func (b *balancer) forgetVIP(vip netip.Addr) {
	delete(b.vips, vip)
	word, mask := vipBit(vip)
	if b.bits[bitOf(word, mask)]--; b.bits[bitOf(word, mask)] == 0 {
		delete(b.bits, bitOf(word, mask))
		b.maps.store(&b.maps.vipBits[word], b.maps.vipBits[word]&^mask)
	}
}

// forgetBackends frees the numbers of backends that no slot names any more.
func (b *balancer) forgetBackends(wanted map[lb.BackendID]lb.Backend, now time.Time) {
	for id, known := range b.backends {
		if _, ok := wanted[id]; ok {
			continue
		}
		b.backendNumbers.give(known.number, now)
		b.dropHop(known.hop, now)
		delete(b.backends, id)
	}
}
