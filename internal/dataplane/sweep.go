// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// sweepBatch is how many flows are read at a time.
const sweepBatch = 4096

// Sweep removes idle flows whose timer the kernel had no memory for, and
// returns how many there are. All others expire by themselves.
func (d *Dataplane) Sweep() (flows int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return 0, ErrNotLoaded
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &now); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	var idle []bpfFlowKey
	err = eachFlow(d.loaded.Flows, func(key bpfFlowKey, flow *bpfFlow) {
		flows++
		if d.idle(key, *flow, uint64(now.Nano())) {
			idle = append(idle, key)
		}
	})
	if err != nil {
		return flows, err
	}
	for _, key := range idle {
		if err := d.loaded.Flows.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return flows, fmt.Errorf("remove an idle flow: %w", err)
		}
	}
	d.flows = flows - len(idle)
	return d.flows, errors.Join(d.sweepAffinities(uint64(now.Nano())), d.sweepNAT())
}

// sweepAffinities removes those that keep no client any more.
func (d *Dataplane) sweepAffinities(now uint64) error {
	d.affinities = 0
	var over []bpfFlowKey
	err := eachFlow(d.loaded.Affinities, func(key bpfFlowKey, a *bpfAffinity) {
		if d.receiver.keeps(key, a, now) {
			d.affinities++
		} else {
			over = append(over, key)
		}
	})
	if err != nil {
		return err
	}
	for _, key := range over {
		if err := d.loaded.Affinities.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove an affinity: %w", err)
		}
	}
	return nil
}

// keeps says whether a client still belongs to a Pod.
func (r *receiver) keeps(key bpfFlowKey, a *bpfAffinity, now uint64) bool {
	pod := r.pods[bpfPodKey{Address: a.Pod, Port: a.PodPort, Proto: key.Proto}]
	for _, serves := range pod.Serves[:pod.Count] {
		if serves.Vip == key.Vip && serves.Port == key.VipPort {
			return serves.Affinity != 0 && now < a.Seen+uint64(lasts(a.Affinity))
		}
	}
	return false
}

// eachFlow calls f with each entry of a map whose keys are flows'.
func eachFlow[V any](m *ebpf.Map, f func(bpfFlowKey, *V)) error { return eachEntry(m, f) }

// eachEntry calls f with each entry of a hash map.
func eachEntry[K, V any](m *ebpf.Map, f func(K, *V)) error {
	keys, values := make([]K, sweepBatch), make([]V, sweepBatch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			f(keys[i], &values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", m, err)
		}
	}
}

// purgeFlows removes the entries of the Pods that f says.
func (o *objects) purgeFlows(f func(bpfPodKey) bool) error {
	for _, m := range []*ebpf.Map{o.Flows, o.Pending} {
		var gone []bpfFlowKey
		err := eachFlow(m, func(key bpfFlowKey, flow *bpfFlow) {
			if f(bpfPodKey{Address: flow.Pod, Port: flow.PodPort, Proto: key.Proto}) {
				gone = append(gone, key)
			}
		})
		if err != nil {
			return err
		}
		for _, key := range gone {
			if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("delete from %s: %w", m, err)
			}
		}
	}
	return nil
}

func (d *Dataplane) idle(key bpfFlowKey, flow bpfFlow, now uint64) bool {
	if flow.Fins&uint8(bpfFlowFinFLOW_ARMED) != 0 {
		return false
	}
	limit := d.constant.IdleTcpNs
	switch {
	case lb.Protocol(key.Proto) == lb.UDP:
		limit = d.constant.IdleUdpNs
	case bpfFlowState(flow.State) == bpfFlowStateFLOW_CLOSING:
		limit = d.constant.IdleClosingNs
	}
	return now > flow.Seen && now-flow.Seen > limit
}
