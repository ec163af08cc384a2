// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"fmt"
	"net/netip"
	"slices"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/health"
	"fairlead.dev/fairlead/internal/lb"
)

// withHealth is the plan with backends whose check fails taking no new flows,
// or gone where the check says so. Where all would fail, all stay: then it is
// rather the check that is wrong, or nothing is lost. Those frontends are
// returned too.
func withHealth(p lb.Plan, verdicts map[lb.ProbeID]health.Verdict) (lb.Plan, []lb.FrontendID) {
	failing, reset := map[lb.ProbeID]bool{}, map[lb.ServiceID]bool{}
	for _, probe := range p.Probes {
		if v, ok := verdicts[probe.ID]; ok && !v.Healthy {
			failing[probe.ID] = true
		}
		reset[probe.ID.Service] = probe.Check.Reset
	}
	if len(failing) == 0 {
		return p, nil
	}
	var allOut []lb.FrontendID
	p.Frontends = slices.Clone(p.Frontends)
	for i, f := range p.Frontends {
		backends, taking, failed := make([]lb.Backend, 0, len(f.Backends)), 0, 0
		for _, b := range f.Backends {
			if b.State == lb.Active && failing[probeOf(f, b)] {
				failed++
				if b.State = lb.Failing; reset[f.Service] {
					continue
				}
			}
			if b.State == lb.Active && b.Weight > 0 {
				taking++
			}
			backends = append(backends, b)
		}
		switch {
		case failed > 0 && taking == 0:
			allOut = append(allOut, f.ID)
		case failed > 0:
			p.Frontends[i].Backends = backends
		}
	}
	return p, allOut
}

func probeOf(f lb.Frontend, b lb.Backend) lb.ProbeID {
	return lb.ProbeID{Service: f.Service, Target: b.ID.Target, Protocol: f.ID.Protocol}
}

// bindProbe leads a probe's socket to its backend.
func (a *Agent) bindProbe(p lb.Probe, fd int) error {
	d := a.forwarding.Load()
	if d == nil {
		return fmt.Errorf("nothing is forwarded yet")
	}
	return d.BindProbe(p, fd)
}

// noteHealth tells of frontends all of whose backends fail, once each time.
func (a *Agent) noteHealth(allOut []lb.FrontendID) {
	now := map[lb.FrontendID]bool{}
	for _, id := range allOut {
		now[id] = true
		if !a.allOut[id] {
			a.log.Error("every backend fails its health check: all of them are used, as if none did", "address", id.String())
		}
	}
	for id := range a.allOut {
		if !now[id] {
			a.log.Info("some backend passes its health check again", "address", id.String())
		}
	}
	a.allOut = now
}

// suspectUnreachable has backends probed at once whose nodes somebody said cannot
// be reached.
func (a *Agent) suspectUnreachable(d *dataplane.Dataplane, plan lb.Plan) {
	if len(plan.Probes) == 0 {
		return
	}
	said, err := d.Unreachable()
	if err != nil || len(said) == 0 {
		return
	}
	var ids []lb.ProbeID
	for _, p := range plan.Probes {
		if p.Tunneled && slices.Contains(said, p.Via.Tunnel) {
			ids = append(ids, p.ID)
		}
	}
	a.health.Suspect(ids...)
}

// suspects are the probes of backends that no next hop leads to.
func suspects(probes []lb.Probe, hops map[netip.Addr]lb.NextHop) []lb.ProbeID {
	var all []lb.ProbeID
	for _, p := range probes {
		if _, ok := hops[p.Via.Tunnel]; !ok && p.Tunneled {
			all = append(all, p.ID)
		}
	}
	return all
}
