// SPDX-License-Identifier: Apache-2.0

// Package dataplane loads the BPF programs, attaches them, and makes their
// maps match a plan.
package dataplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/flowhash"
	"fairlead.dev/fairlead/internal/lb"
)

// Config is what stays while the agent runs.
type Config struct {
	Interfaces []string         // devices that carry XDP
	PinDir     string           // on a BPF file system; links and the table of flows
	Secret     *flowhash.Secret // nil on nodes that only have role backend
	Tag        [8]byte          // this node's own
	VNI        uint32           // names the shard; 24 bits
	GenevePort uint16
	Timeouts   lb.Timeouts
	Limits     Limits
	NATPorts   PortRange
	Census     bool // backends' nodes are asked which flows they have
	PureHash   bool // forget who had a slot, for comparison
	Generic    bool // use generic XDP, with a warning, where a driver has none
	Log        *slog.Logger
}

// PortRange is ports, both ends included.
type PortRange struct{ First, Last uint16 }

// DefaultNATPorts are above what Linux gives to sockets by itself.
var DefaultNATPorts = PortRange{61000, 65535}

// Limits are the sizes of the maps. 0 means the default.
type Limits struct {
	Services, Slots, Candidates, Hints, Backends, NextHops, Pods, Flows, Pending, Fragments, LBNodes int

	SourceRanges, Clients, Affinities, NATFlows int
}

// withDefaults fills in what is 0. In brackets, the memory of the default:
// services 2 MiB and 0.8 MiB a CPU, slots 32 MiB, candidates 8 MiB, hints 6 MiB,
// backends 4 MiB and 1.5 MiB a CPU, pending 16 MiB, fragments 2 MiB, clients
// 6 MiB; the rest is allocated as it is used, at most about 200 bytes a flow.
func (l Limits) withDefaults() Limits {
	set := func(to *int, value int) {
		if *to == 0 {
			*to = value
		}
	}
	set(&l.Services, 32768)
	set(&l.Slots, 4<<20)
	set(&l.Candidates, 1<<18)
	set(&l.Hints, 65536)
	set(&l.Backends, 65536)
	set(&l.NextHops, 16384)
	set(&l.Pods, 16384)
	set(&l.Flows, 1<<20)
	set(&l.Pending, 65536)
	set(&l.Fragments, 16384)
	set(&l.LBNodes, 1024)
	set(&l.SourceRanges, 1<<17)
	set(&l.Clients, 65536)
	set(&l.Affinities, 1<<18)
	set(&l.NATFlows, 1<<18)
	return l
}

// Desired is all that one node's dataplane should be.
type Desired struct {
	Plan          lb.Plan
	NextHops      map[netip.Addr]lb.NextHop // by tunnel address; those not resolved are missing
	PodInterfaces []int                     // devices that local Pods are reached by
	MTU           int                       // of the uplinks, for the MSS clamp; 0: none
}

// Dataplane is one node's programs and maps. It is safe for concurrent use.
type Dataplane struct {
	config Config
	now    func() time.Time

	mu       sync.Mutex
	loaded   *objects // nil until the first Set
	tracing  *objects // the same for Trace; nil until it is asked for
	maps     *contents
	balancer *balancer
	receiver *receiver
	constant bpfConfig // that the attached programs were loaded with
	hooks    *hooks
	flows    int // when they were last counted

	affinities, natFlows int // the same

	ownership *Ownership // the last, see Owned

	probed      atomic.Pointer[probing]
	unreachable map[bpfAddr]uint64 // when somebody said so, as last seen
}

// Open checks what can be checked before there is a plan. It loads nothing.
func Open(cfg Config) (*Dataplane, error) {
	cfg.Limits, cfg.Timeouts = cfg.Limits.withDefaults(), withDefaults(cfg.Timeouts)
	if cfg.NATPorts == (PortRange{}) {
		cfg.NATPorts = DefaultNATPorts
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if len(cfg.Interfaces) == 0 {
		return nil, errors.New("interfaces: none given; name the devices that carry the traffic")
	}
	if cfg.NATPorts.First == 0 || cfg.NATPorts.Last < cfg.NATPorts.First {
		return nil, fmt.Errorf("nat.ports: %d-%d is no range of ports", cfg.NATPorts.First, cfg.NATPorts.Last)
	}
	if cfg.VNI >= 1<<24 {
		return nil, fmt.Errorf("geneve.vni: %d does not fit 24 bits", cfg.VNI)
	}
	if err := checkLimits(cfg.Limits); err != nil {
		return nil, err
	}
	if err := checkPinDir(cfg.PinDir); err != nil {
		return nil, err
	}
	return &Dataplane{config: cfg, now: time.Now}, nil
}

func checkLimits(l Limits) error {
	for name, value := range map[string]int{"services": l.Services, "slots": l.Slots, "candidates": l.Candidates, "hints": l.Hints, "backends": l.Backends,
		"nextHops": l.NextHops, "pods": l.Pods, "flows": l.Flows, "pending": l.Pending, "fragments": l.Fragments, "lbNodes": l.LBNodes,
		"sourceRanges": l.SourceRanges, "clients": l.Clients, "affinities": l.Affinities, "natFlows": l.NATFlows} {
		if value < 2 || value > 1<<27 {
			return fmt.Errorf("limits.%s: %d is not between 2 and %d", name, value, 1<<27)
		}
	}
	return nil
}

// Set makes the dataplane what is wanted: it loads and fills on the first
// call, applies the difference on later ones, and attaches only when the maps
// are right. After an error it may be called again with the same value.
func (d *Dataplane) Set(_ context.Context, want Desired) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.prepare(want); err != nil {
		return err
	}
	if err := d.loaded.pinMaps(d.config.PinDir); err != nil {
		return err
	}
	return d.hooks.set(d.loaded, want)
}

// Prepare does what Set does but attaches nothing: what an earlier agent left
// attached goes on forwarding, by the maps that it has.
func (d *Dataplane) Prepare(want Desired) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.prepare(want)
}

func (d *Dataplane) prepare(want Desired) error {
	constant, err := d.constants(want)
	if err != nil {
		return err
	}
	if d.loaded == nil {
		if err := d.load(constant, want.Plan); err != nil {
			return err
		}
	}
	if want.Plan.LoadBalancer && d.constant.Lb == 0 {
		return fmt.Errorf("refuse Node %s: it became a LoadBalancer while the agent ran; restart the agent", want.Plan.Node)
	}
	now := d.now()
	if err := d.balancer.set(want.Plan, want.NextHops, now); err != nil {
		return err
	}
	if err := d.receiver.set(want.Plan); err != nil {
		return err
	}
	d.noteProbed(want.Plan)
	if constant == d.constant {
		return nil
	}
	fresh, err := d.loaded.reload(constant)
	if err != nil {
		return err
	}
	d.loaded, d.constant = fresh, constant
	d.maps.reach(fresh)
	d.noteProbed(want.Plan)
	return d.stopTracing()
}

// load makes the maps, and programs that are not attached yet.
func (d *Dataplane) load(constant bpfConfig, plan lb.Plan) error {
	loaded, err := loadObjects(d.config, constant, plan.LoadBalancer)
	if err != nil {
		return err
	}
	maps, err := loaded.contents()
	if err != nil {
		loaded.close()
		return err
	}
	limits := d.config.Limits
	if !plan.LoadBalancer {
		limits = limits.withoutBalancer()
	}
	receiver, err := newReceiver(maps, limits)
	if err != nil {
		loaded.close()
		return err
	}
	d.loaded, d.maps, d.constant, d.receiver = loaded, maps, constant, receiver
	d.balancer = newBalancer(maps, limits, d.tagOf)
	d.balancer.suspicious, d.balancer.forgetful = d.config.Census && !d.config.PureHash, d.config.PureHash
	if plan.LoadBalancer && !d.config.PureHash {
		if d.balancer.adopted, err = adoptTables(d.config.PinDir, d.config.Interfaces); err != nil {
			d.config.Log.Warn("cannot read the tables of the program that is attached: beginning without them", "error", err)
		}
	}
	d.hooks = newHooks(d.config)
	return nil
}

func (d *Dataplane) tagOf(node string) [8]byte {
	if d.config.Secret == nil {
		return [8]byte{}
	}
	return d.config.Secret.Tag(node)
}

// Close gives back what the process holds. The programs stay attached by
// their pinned links, and go on forwarding.
func (d *Dataplane) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil
	}
	err := errors.Join(d.stopTracing(), d.hooks.close(), d.maps.unmap(), d.loaded.close())
	d.loaded = nil
	return err
}
