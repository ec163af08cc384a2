// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// probed are the backends' numbers and generations, as the last Set left them.
type probed map[lb.BackendID]bpfProbe

// BindProbe makes what a socket sends go to the backend that is probed, and to
// no other. It is called before the socket is connected, and does not wait for
// a Set that is under way.
func (d *Dataplane) BindProbe(p lb.Probe, fd int) error {
	known := d.probed.Load()
	if known == nil {
		return ErrNotLoaded
	}
	to, ok := known.backends[p.Via]
	if !ok {
		return fmt.Errorf("backend %s is not programmed yet", p.ID.Target)
	}
	cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("read the socket's cookie: %w", err)
	}
	port := p.Check.Port
	if port == 0 {
		port = p.ID.Target.Port()
	}
	to.Port = swap16(port)
	if err := known.sockets.Put(cookie, to); err != nil {
		return fmt.Errorf("write probes: %w", err)
	}
	return nil
}

// noteProbed makes the backends that are to be probed known to BindProbe.
func (d *Dataplane) noteProbed(plan lb.Plan) {
	backends := probed{}
	for _, p := range plan.Probes {
		if known := d.balancer.backends[p.Via]; known != nil && p.Tunneled {
			backends[p.Via] = bpfProbe{Backend: known.number, Generation: known.generation & generationMask}
		}
	}
	d.probed.Store(&probing{backends: backends, sockets: kernelMap[uint64, bpfProbe]{d.loaded.Probes}})
}

// Unreachable returns the tunnel addresses that somebody said cannot be reached,
// each once.
func (d *Dataplane) Unreachable() ([]netip.Addr, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.loaded == nil {
		return nil, ErrNotLoaded
	}
	said, err := kernelMap[bpfAddr, uint64]{d.loaded.Unreachable}.All()
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for a, when := range said {
		if d.unreachable[a] != when {
			all = append(all, addrOf(a))
		}
	}
	d.unreachable = said
	return all, nil
}

type probing struct {
	backends probed
	sockets  hashMap[uint64, bpfProbe]
}
