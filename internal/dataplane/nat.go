// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/slots"
)

// natOpening is how long a flow of mode NAT that is not answered is kept.
const natOpening = 30 * time.Second

// NATCensus asks this node's own table which flows of mode NAT there are: it
// ends contests that none needs any more.
func (d *Dataplane) NATCensus() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	contested := map[lb.FrontendID]*frontend{}
	for id, known := range d.balancer.frontends {
		if known.applied.Mode == lb.ModeNAT && known.table.Contested() > 0 {
			contested[id] = known
		}
	}
	if len(contested) == 0 {
		return nil
	}
	now := d.now()
	type owner struct {
		frontend lb.FrontendID
		target   netip.AddrPort
	}
	hashes := map[owner][]uint64{}
	err := d.eachNAT(func(key bpfNatKey, flow *bpfNatFlow, _ bool) {
		o := owner{lb.FrontendID{VIP: addrOf(flow.Vip), Port: swap16(flow.VipPort), Protocol: lb.Protocol(key.Proto)},
			netip.AddrPortFrom(addrOf(key.Backend), swap16(key.BackendPort))}
		if contested[o.frontend] != nil {
			hashes[o] = append(hashes[o], flow.Hash)
		}
	})
	if err != nil {
		return err
	}
	answers := Answers{}
	for id, known := range contested {
		answers[id] = map[lb.BackendID]slots.Answer{}
		for _, backend := range known.applied.Backends {
			if backend.ID.Mode == lb.ModeLocal {
				continue // it has its flows in another table, until they idle
			}
			bitmap := make([]uint64, max(known.table.Len()/64, 1))
			width := known.bits
			for _, hash := range hashes[owner{id, backend.ID.Target}] {
				slot := hash >> (64 - width)
				bitmap[slot/64] |= 1 << (slot % 64)
			}
			answers[id][backend.ID] = slots.Answer{Asked: now, Owns: bitmap}
		}
	}
	return d.balancer.census(answers, now)
}

// sweepNAT removes what has expired, and counts the rest.
func (d *Dataplane) sweepNAT() error {
	d.natFlows = 0
	var over []bpfNatKey
	err := d.eachNAT(func(key bpfNatKey, _ *bpfNatFlow, expired bool) {
		if expired {
			over = append(over, key)
		} else {
			d.natFlows++
		}
	})
	if err != nil {
		return err
	}
	for _, key := range over {
		if err := d.loaded.NatFlows.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return fmt.Errorf("remove an idle flow of mode NAT: %w", err)
		}
	}
	return nil
}

// eachNAT calls f with each flow, and whether it has expired.
func (d *Dataplane) eachNAT(f func(bpfNatKey, *bpfNatFlow, bool)) error {
	var clock unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC_COARSE, &clock); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	now := uint64(clock.Nano())
	return eachEntry(d.loaded.NatFlows, func(key bpfNatKey, flow *bpfNatFlow) {
		idle := d.constant.IdleTcpNs
		switch {
		case bpfNatState(flow.State) == bpfNatStateNAT_OPENING:
			idle = uint64(natOpening)
		case bpfNatState(flow.State) == bpfNatStateNAT_CLOSING:
			idle = d.constant.IdleClosingNs
		case lb.Protocol(key.Proto) == lb.UDP:
			idle = d.constant.IdleUdpNs
		}
		f(key, flow, now > flow.Seen+idle)
	})
}
