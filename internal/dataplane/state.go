// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"fairlead.dev/fairlead/internal/lb"
)

// ErrNotLoaded says that no Set has succeeded in loading the programs yet.
var ErrNotLoaded = errors.New("the BPF programs are not loaded yet")

// Counter is what was forwarded.
type Counter struct{ Packets, Bytes, Connections uint64 }

// State is what the maps hold.
type State struct {
	Attachments []Attachment
	Frontends   []FrontendState // sorted by VIP, port, protocol
	Pods        []lb.Pod        // sorted by target; Service is not known
	Drops       [bpfDropDROP_MAX]uint64
	Events      [bpfEventEVENT_MAX]uint64
	Capacity    []Capacity
}

// Attachment is a program on a device.
type Attachment struct {
	Interface string
	Index     int
	Program   string
	Mode      string // "native" or "generic"
}

// FrontendState is a service in the maps.
type FrontendState struct {
	ID            lb.FrontendID
	Number, Slots uint32
	Contested     int // slots of which others than their backend may own flows
	Changed       time.Time
	Moved         float64 // share of the flow hashes whose backend changed then
	Counter
	Backends []BackendState // sorted by target
}

// BackendState is a backend in the maps.
type BackendState struct {
	ID      lb.BackendID
	Number  uint32
	Slots   uint32 // of the frontend, that name it
	State   string // "active", "draining", "failing", "gone"
	NextHop bool   // resolved
	Counter        // over all frontends
}

// Capacity is how full a map is. Used is -1 where counting would cost too much;
// that of flows is what the last Sweep found.
type Capacity struct {
	Map  string
	Used int
	Max  int
}

// Read returns what the maps hold now.
func (d *Dataplane) Read() (State, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return State{}, ErrNotLoaded
	}
	var s State
	if err := errors.Join(sumOver(d.loaded.Drops, s.Drops[:]), sumOver(d.loaded.Events, s.Events[:])); err != nil {
		return State{}, err
	}
	services, err := counters(d.loaded.ServiceCounters)
	if err != nil {
		return State{}, err
	}
	backends, err := counters(d.loaded.BackendCounters)
	if err != nil {
		return State{}, err
	}
	for id, f := range d.balancer.frontends {
		s.Frontends = append(s.Frontends, d.frontendState(id, f, services, backends))
	}
	slices.SortFunc(s.Frontends, func(a, b FrontendState) int { return a.ID.Compare(b.ID) })
	for key, value := range d.receiver.pods {
		s.Pods = append(s.Pods, podOf(key, value))
	}
	slices.SortFunc(s.Pods, func(a, b lb.Pod) int {
		if c := a.Target.Compare(b.Target); c != 0 {
			return c
		}
		return int(a.Protocol) - int(b.Protocol)
	})
	if s.Attachments, err = d.attachments(); err != nil {
		return State{}, err
	}
	s.Capacity = d.capacity()
	return s, nil
}

func (d *Dataplane) frontendState(id lb.FrontendID, f *frontend, services, backends []Counter) FrontendState {
	state := FrontendState{ID: id, Number: f.number, Contested: f.table.Contested(), Changed: f.changed, Moved: f.moved, Counter: services[f.number]}
	share := map[uint32]uint32{}
	if f.bits > 0 {
		state.Slots = 1 << f.bits
		run := d.maps.slots[f.offset : f.offset+state.Slots]
		for i := range run {
			share[uint32(atomic.LoadUint64(&run[i]))]++
		}
	}
	for _, b := range f.applied.Backends {
		known := d.balancer.backends[b.ID]
		if known == nil {
			continue
		}
		word := atomic.LoadUint64(&d.maps.backends[known.number].Word)
		state.Backends = append(state.Backends, BackendState{ID: b.ID, Number: known.number, Slots: share[known.number],
			State: stateName(wordState(word)), NextHop: uint32(word) != 0, Counter: backends[known.number]})
	}
	return state
}

func stateName(s bpfBackendState) string {
	switch s {
	case bpfBackendStateBACKEND_ACTIVE:
		return "active"
	case bpfBackendStateBACKEND_DRAINING:
		return "draining"
	case bpfBackendStateBACKEND_FAILING:
		return "failing"
	case bpfBackendStateBACKEND_GONE:
		return "gone"
	}
	return "unused"
}

func podOf(key bpfPodKey, value bpfPod) lb.Pod {
	pod := lb.Pod{Target: netip.AddrPortFrom(addrOf(key.Address), swap16(key.Port)), Protocol: lb.Protocol(key.Proto)}
	for _, vip := range value.Serves[:min(value.Count, podServesMax)] {
		pod.Serves = append(pod.Serves, netip.AddrPortFrom(addrOf(vip.Vip), swap16(vip.Port)))
	}
	return pod
}

// sumOver adds up a per-CPU array of numbers.
func sumOver(m *ebpf.Map, to []uint64) error {
	var key uint32
	var perCPU []uint64
	each := m.Iterate()
	for each.Next(&key, &perCPU) {
		for _, value := range perCPU {
			to[key] += value
		}
	}
	if err := each.Err(); err != nil {
		return fmt.Errorf("read %s: %w", m, err)
	}
	return nil
}

// counters reads a whole per-CPU array of counters in a few calls.
func counters(m *ebpf.Map) ([]Counter, error) {
	cpus, err := ebpf.PossibleCPU()
	if err != nil {
		return nil, fmt.Errorf("count CPUs: %w", err)
	}
	all := make([]Counter, m.MaxEntries())
	keys := make([]uint32, 4096)
	values := make([]bpfCounter, len(keys)*cpus)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i, key := range keys[:n] {
			for _, c := range values[i*cpus : (i+1)*cpus] {
				all[key].Packets += c.Packets
				all[key].Bytes += c.Bytes
				all[key].Connections += c.Connections
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", m, err)
		}
	}
}

// attachments are the XDP programs of ours that are really on the devices.
func (d *Dataplane) attachments() ([]Attachment, error) {
	info, err := d.loaded.FairleadXdp.Info()
	if err != nil {
		return nil, fmt.Errorf("read the program's id: %w", err)
	}
	id, _ := info.ID()
	var found []Attachment
	for _, name := range d.config.Interfaces {
		device, err := netlink.LinkByName(name)
		if err != nil {
			continue
		}
		xdp := device.Attrs().Xdp
		if xdp == nil || ebpf.ProgramID(xdp.ProgId) != id {
			continue
		}
		mode := "native"
		if xdp.AttachMode == 2 { // XDP_ATTACHED_SKB
			mode = "generic"
		}
		found = append(found, Attachment{Interface: name, Index: device.Attrs().Index, Program: info.Name, Mode: mode})
	}
	return found, nil
}

func (d *Dataplane) capacity() []Capacity {
	b, limits := d.balancer, d.config.Limits
	return []Capacity{
		{"services", int(b.serviceNumbers.used), int(b.serviceNumbers.size) - 1},
		{"slots", int(b.runs.used), int(b.runs.size)},
		{"candidates", int(b.rowNumbers.used), int(b.rowNumbers.size) - 1},
		{"hints", -1, limits.Hints},
		{"backends", int(b.backendNumbers.used), int(b.backendNumbers.size) - 1},
		{"next_hops", int(b.hopNumbers.used), int(b.hopNumbers.size) - 1},
		{"pods", len(d.receiver.pods), limits.Pods},
		{"lb_nodes", len(d.receiver.lbNodes), limits.LBNodes},
		{"flows", d.flows, limits.Flows},
		{"pending", -1, limits.Pending},
		{"fragments", -1, limits.Fragments},
		{"source_ranges", b.ranges, limits.SourceRanges},
		{"clients", -1, limits.Clients},
		{"affinities", d.affinities, limits.Affinities},
		{"nat_flows", d.natFlows, limits.NATFlows},
	}
}
