// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/cilium/ebpf"
)

// Record is a flow that began while its slot was contested, of a service that
// nobody can be asked about, and who took it.
type Record struct {
	Hash   uint64
	Target netip.AddrPort
}

// heldModes are those of servers that hold the VIP.
var heldModes = map[bpfMode]bool{bpfModeMODE_IPIP: true, bpfModeMODE_L2: true}

// Recording says whether flows may be recorded now: whether any slot of a
// service that nobody can be asked about is contested.
func (d *Dataplane) Recording() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return false
	}
	for _, f := range d.balancer.frontends {
		if f.applied.Mode.Held() && f.table.Contested() > 0 {
			return true
		}
	}
	return false
}

// Records returns the flows that are recorded now. SYNs that no packet followed
// are not among them.
func (d *Dataplane) Records() ([]Record, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil, ErrNotLoaded
	}
	keys, values := make([]uint64, sweepBatch), make([]bpfHint, sweepBatch)
	var all []Record
	var cursor ebpf.MapBatchCursor
	for {
		n, err := d.loaded.Hints.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			if int(values[i].Backend) >= len(d.maps.backends) {
				continue
			}
			row := &d.maps.backends[values[i].Backend]
			if heldModes[bpfMode(row.Mode)] && uint32(row.Word>>generationShift)&generationMask == values[i].Generation {
				all = append(all, Record{keys[i], netip.AddrPortFrom(addrOf(row.Address), swap16(row.Port))})
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read hints: %w", err)
		}
	}
}

// Record notes what another LB node has recorded. What this one recorded
// itself, and backends that it does not know, stay as they are.
func (d *Dataplane) Record(records []Record) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	numbers := map[netip.AddrPort]*backend{}
	for id, known := range d.balancer.backends {
		if id.Mode.Held() {
			numbers[id.Target] = known
		}
	}
	for _, r := range records {
		known := numbers[r.Target]
		if known == nil {
			continue
		}
		err := d.loaded.Hints.Update(r.Hash, bpfHint{Backend: known.number, Generation: known.generation & generationMask}, ebpf.UpdateNoExist)
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("note a record: %w", err)
		}
	}
	return nil
}
