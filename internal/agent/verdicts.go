// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"net/netip"
	"time"

	"fairlead.dev/fairlead/internal/health"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/peer"
)

// verdictsAgain is how often all verdicts that others need are told again.
const verdictsAgain = 3 * time.Second

// maxTold is the most of a problem that is taken from another node, in bytes.
const maxTold = 256

// toldVerdict is what another LB node's probes said, and when.
type toldVerdict struct {
	health.Verdict
	at time.Time
}

// verdicts are this node's own, and for backends that others probe, theirs.
func (a *Agent) verdicts() map[lb.ProbeID]health.Verdict {
	all := a.health.Verdicts()
	for id, v := range a.heard {
		if _, own := all[id]; !own {
			all[id] = v.Verdict
		}
	}
	return all
}

// probesHere are those that this node does: its own, and those of others from
// whom nothing has been heard for so long that they may be gone.
func (a *Agent) probesHere(p lb.Plan, now time.Time) []lb.Probe {
	here := make([]lb.Probe, 0, len(p.Probes))
	wanted := map[lb.ProbeID]bool{}
	for _, probe := range p.Probes {
		if !probe.Elsewhere || a.census == nil {
			here = append(here, probe)
			continue
		}
		wanted[probe.ID] = true
		since, waiting := a.awaited[probe.ID]
		if !waiting {
			since = now
			a.awaited[probe.ID] = now
		}
		if heard := a.heard[probe.ID].at; heard.After(since) {
			since = heard
		}
		if now.Sub(since) > max(3*verdictsAgain, 3*probe.Check.Interval)+probe.Check.Timeout {
			here = append(here, probe)
		}
	}
	for id := range a.awaited {
		if !wanted[id] {
			delete(a.awaited, id)
			delete(a.heard, id)
		}
	}
	return here
}

// Judge takes in what another LB node's probes say.
func (p peerNode) Judge(verdicts []peer.Verdict) error {
	a, now, changed := p.agent, time.Now(), false
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, v := range verdicts {
		id := lb.ProbeID{Service: lb.ServiceID{Namespace: v.Namespace, Name: v.Name}, Target: v.Target, Protocol: v.Protocol}
		if _, wanted := a.awaited[id]; !wanted {
			continue // so nobody makes this node remember what it does not need
		}
		before := a.heard[id]
		now := toldVerdict{health.Verdict{Healthy: v.Healthy, Known: true, Problem: v.Problem[:min(len(v.Problem), maxTold)], Last: now, Since: before.Since}, now}
		if before.Healthy != v.Healthy {
			now.Since = now.at
		}
		changed = changed || before.Healthy != v.Healthy || before.at.IsZero()
		a.heard[id] = now
	}
	if changed {
		a.trigger.Fire()
	}
	return nil
}

// tellVerdicts tells the other LB nodes what this one's probes say of backends
// that they do not probe: what has changed, and everything every so often.
func (a *Agent) tellVerdicts(ctx context.Context, plan lb.Plan) {
	a.mu.Lock()
	here := len(a.probesHere(plan, time.Now()))
	own := a.health.Verdicts()
	late := here != a.probing
	a.mu.Unlock()
	if late {
		a.trigger.Fire()
	}
	if time.Since(a.judgedAll) >= verdictsAgain {
		clear(a.judged)
		a.judgedAll = time.Now()
	}
	var fresh []peer.Verdict
	for _, probe := range plan.Probes {
		v, ok := own[probe.ID]
		if !ok || !v.Known || probe.Check.Probers == 0 || probe.Elsewhere {
			continue
		}
		if told, ok := a.judged[probe.ID]; ok && told == v.Healthy {
			continue
		}
		a.judged[probe.ID] = v.Healthy
		fresh = append(fresh, peer.Verdict{Namespace: probe.ID.Service.Namespace, Name: probe.ID.Service.Name, Target: probe.ID.Target,
			Protocol: probe.ID.Protocol, Healthy: v.Healthy, Problem: v.Problem})
	}
	if len(fresh) == 0 {
		return
	}
	a.tellPeers(ctx, plan, func(ctx context.Context, node string, at netip.AddrPort) error {
		return a.census.client.TellVerdicts(ctx, node, at, fresh)
	})
}
