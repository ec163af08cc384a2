// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"

	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/plan"
)

// SimulateRequest names files and directories of objects, as sources do.
type SimulateRequest struct {
	Paths []string `json:"paths"`
}

// Simulation is what objects would change about one frontend, if they took the
// place of those in force.
type Simulation struct {
	Service   string  `json:"service"`
	Address   string  `json:"address"`
	SlotsNow  uint32  `json:"slotsNow"`
	SlotsThen uint32  `json:"slotsThen"`
	Moved     float64 `json:"moved"` // share of the flow hashes
	// Of the flows that backends have now, as their nodes say: all; those whose
	// hash will name another backend; and those expected to break, and why.
	Flows     uint32 `json:"flows"`
	Concerned uint32 `json:"concerned"`
	Break     uint32 `json:"break"`
	Reason    string `json:"reason,omitempty"`
}

func (a *Agent) simulate(w http.ResponseWriter, r *http.Request) {
	var request SimulateRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, largestRequest)).Decode(&request); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	all, err := a.simulation(r.Context(), request.Paths)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	writeJSON(w, all)
}

func (a *Agent) simulation(ctx context.Context, paths []string) ([]Simulation, error) {
	snapshot, findings := file.Load(paths)
	var next lb.Plan
	if !file.Failed(findings) {
		var more []lb.Finding
		next, more = plan.ForNode(snapshot, a.config.Node)
		findings = append(findings, more...)
	}
	for _, f := range findings {
		if f.Severity == lb.Error {
			return nil, f
		}
	}
	a.mu.Lock()
	d, now := a.dataplane, a.plan
	a.mu.Unlock()
	if d == nil {
		return nil, fmt.Errorf("the agent has no good configuration yet; see fairlead status")
	}
	simulated, err := d.Simulate(next)
	if err != nil {
		return nil, err
	}
	flows := a.countFlows(ctx, now)
	all := make([]Simulation, 0, len(simulated))
	for _, s := range simulated {
		one := Simulation{Service: s.Service.String(), Address: s.ID.String(), SlotsNow: s.SlotsNow, SlotsThen: s.SlotsThen, Moved: s.Moved}
		gone := map[lb.BackendID]bool{}
		for _, id := range s.Gone {
			gone[id] = true
		}
		concerned := 0.0
		for id, n := range flows[s.ID] {
			one.Flows += n
			concerned += float64(n) * s.Lost[id]
			if gone[id] {
				one.Break += n
			}
		}
		one.Concerned = uint32(concerned + 0.5)
		switch {
		case len(s.Gone) > 0:
			one.Reason = fmt.Sprintf("%d backends go, and their flows with them; let them drain first", len(s.Gone))
		case s.Mode.Held() && s.Moved > 0:
			one.Reason = "nobody can be asked which flows there are: an LB node that is lost meanwhile breaks those that it recorded"
		}
		all = append(all, one)
	}
	return all, nil
}

// countFlows asks now how many flows each backend has; who does not answer has
// none here.
func (a *Agent) countFlows(ctx context.Context, now lb.Plan) map[lb.FrontendID]map[lb.BackendID]uint32 {
	if a.census == nil {
		return nil
	}
	sizes := map[lb.FrontendID]int{}
	for _, f := range now.Frontends {
		sizes[f.ID] = int(f.TableSize)
	}
	fresh := newCensus(a.identity, a.config.Peers.Port)
	a.mu.Lock()
	d := a.dataplane
	a.mu.Unlock()
	fresh.take(ctx, d, fresh.inquiries(now, sizes), a.log)
	return fresh.flows
}
