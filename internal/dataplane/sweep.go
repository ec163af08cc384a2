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
	keys, values := make([]bpfFlowKey, sweepBatch), make([]bpfFlow, sweepBatch)
	var idle []bpfFlowKey
	var cursor ebpf.MapBatchCursor
	for {
		n, err := d.loaded.Flows.BatchLookup(&cursor, keys, values, nil)
		for i := range n {
			flows++
			if d.idle(keys[i], values[i], uint64(now.Nano())) {
				idle = append(idle, keys[i])
			}
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			return flows, fmt.Errorf("read flows: %w", err)
		}
	}
	for _, key := range idle {
		if err := d.loaded.Flows.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return flows, fmt.Errorf("remove an idle flow: %w", err)
		}
	}
	d.flows = flows - len(idle)
	return d.flows, nil
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
