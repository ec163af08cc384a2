// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"errors"
	"fmt"
	"sync/atomic"

	"fairlead.dev/fairlead/internal/lb"
)

// Verify reads the maps back and returns nil when the programs are attached
// and every map holds what the plan says; else the first few differences.
func (d *Dataplane) Verify(want Desired) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return ErrNotLoaded
	}
	attached, err := d.attachments()
	if err != nil {
		return err
	}
	if len(attached) != len(d.config.Interfaces) {
		return fmt.Errorf("our XDP program is on %d of %d interfaces", len(attached), len(d.config.Interfaces))
	}
	if err := errors.Join(d.balancer.verify(want.Plan), d.receiver.verify(want.Plan)); err != nil {
		return err
	}
	return d.balancer.verifyGates(want.Plan)
}

func (b *balancer) verify(plan lb.Plan) error {
	services, err := b.maps.services.All()
	if err != nil {
		return err
	}
	vips := 0
	for key, number := range services {
		if key.Port == 0 && key.Proto == 0 && number == serviceNone {
			vips++
		}
	}
	if have := len(services) - vips; have != len(plan.Frontends) {
		return fmt.Errorf("services: %d in the map, %d in the plan", have, len(plan.Frontends))
	}
	for _, f := range plan.Frontends {
		known := b.frontends[f.ID]
		number, ok := services[serviceKey(f.ID)]
		if known == nil || !ok || number != known.number {
			return fmt.Errorf("services: %s of Service %s is missing or wrong", f.ID, f.Service)
		}
		if _, ok := services[vipKey(f.ID.VIP)]; !ok {
			return fmt.Errorf("services: VIP %s is missing", f.ID.VIP)
		}
		if err := b.verifyFrontend(f, known); err != nil {
			return err
		}
	}
	return nil
}

func (b *balancer) verifyFrontend(f lb.Frontend, known *frontend) error {
	if !sameSlots(known.applied, f) {
		return fmt.Errorf("slots: %s of Service %s has another plan's backends", f.ID, f.Service)
	}
	word, mask := vipBit(f.ID.VIP)
	if atomic.LoadUint64(&b.maps.vipBits[word])&mask == 0 {
		return fmt.Errorf("vip_bits: VIP %s is missing", f.ID.VIP)
	}
	if got := atomic.LoadUint64(&b.maps.serviceWords[known.number]); got != serviceWord(known.offset, known.bits, f) {
		return fmt.Errorf("service_words: %s of Service %s holds %#x", f.ID, f.Service, got)
	}
	if known.bits > 0 && checksum(b.maps.slots[known.offset:known.offset+1<<known.bits]) != known.sum {
		return fmt.Errorf("slots: the run of %s of Service %s is not what was written", f.ID, f.Service)
	}
	for _, backend := range f.Backends {
		row := b.backends[backend.ID]
		if row == nil {
			return fmt.Errorf("backends: %s of Service %s is missing", backend.ID.Target, f.Service)
		}
		got := b.maps.backends[row.number]
		state := wordState(atomic.LoadUint64(&b.maps.backends[row.number].Word))
		expected := backendRow(backend, b.tag(backend.Node))
		expected.Word = got.Word
		if got != expected || state == bpfBackendStateBACKEND_UNUSED || state == bpfBackendStateBACKEND_GONE {
			return fmt.Errorf("backends: %s of Service %s is not what was written", backend.ID.Target, f.Service)
		}
	}
	return nil
}

func (r *receiver) verify(plan lb.Plan) error {
	pods, lbNodes, err := r.wanted(plan)
	if err != nil {
		return err
	}
	havePods, err := r.maps.pods.All()
	if err != nil {
		return err
	}
	for key, value := range pods {
		if havePods[key] != value {
			return fmt.Errorf("pods: %s is missing or wrong", podOf(key, value).Target)
		}
	}
	haveNodes, err := r.maps.lbNodes.All()
	if err != nil {
		return err
	}
	if len(haveNodes) != len(lbNodes) {
		return fmt.Errorf("lb_nodes: %d in the map, %d in the plan", len(haveNodes), len(lbNodes))
	}
	for key, value := range lbNodes {
		if got, ok := haveNodes[key]; !ok || got != value {
			return fmt.Errorf("lb_nodes: %s is missing", addrOf(key.Address))
		}
	}
	return nil
}

// Doubt makes the next Set write everything again. It is for maps that Verify
// found to differ, though the same plan has been set.
func (d *Dataplane) Doubt() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return
	}
	for _, f := range d.balancer.frontends {
		f.doubtful = true
	}
	for _, b := range d.balancer.backends {
		b.doubtful = true
	}
	clear(d.receiver.lbNodes)
	clear(d.receiver.pods)
	clear(d.receiver.cookies)
}
