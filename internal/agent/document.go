// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"time"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/health"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/status"
)

// Status returns the document of now.
func (a *Agent) Status() status.Document {
	a.mu.Lock()
	defer a.mu.Unlock()
	d := status.Document{Node: a.config.Node, Version: a.version, Roles: roles(a.plan), Since: a.started, Now: time.Now(),
		ProgrammedAt: a.programmed, ChangedAt: a.changed, Findings: a.findings, Unresolved: a.unresolved}
	d.Programmed = a.problem == nil
	if a.problem != nil {
		d.Problem = a.problem.Error()
	}
	if a.dataplane == nil {
		return d
	}
	state, err := a.dataplane.Read()
	if err != nil {
		d.Programmed, d.Problem = false, err.Error()
		return d
	}
	for _, at := range state.Attachments {
		d.Attachments = append(d.Attachments, status.Attachment{Interface: at.Interface, Mode: at.Mode})
	}
	wanted := map[lb.FrontendID]lb.Frontend{}
	for _, f := range a.wanted.Frontends {
		wanted[f.ID] = f
	}
	verdicts := a.verdicts()
	for _, f := range state.Frontends {
		d.Services = append(d.Services, a.serviceOf(f, wanted[f.ID], verdicts))
	}
	for _, pod := range state.Pods {
		row := status.Pod{Address: pod.Target.String(), Protocol: pod.Protocol.String()}
		for _, vip := range pod.Serves {
			row.Serves = append(row.Serves, vip.String())
		}
		d.Pods = append(d.Pods, row)
	}
	d.Drops = counts(state.Drops[:], dataplane.DropNames())
	d.Events = counts(state.Events[:], dataplane.EventNames())
	for _, c := range state.Capacity {
		d.Capacity = append(d.Capacity, status.Capacity{Map: c.Map, Used: c.Used, Max: c.Max})
	}
	return d
}

func roles(p lb.Plan) []string {
	var all []string
	if p.LoadBalancer {
		all = append(all, "LoadBalancer")
	}
	if p.Backend {
		all = append(all, "Backend")
	}
	return all
}

func counter(c dataplane.Counter) status.Counter {
	return status.Counter{Packets: c.Packets, Bytes: c.Bytes, Connections: c.Connections}
}

// keeps says what the flows of a service outlive, by its mode.
var keeps = map[lb.Mode]string{
	lb.ModeGeneve: "flows outlive changes of backends, and lost LB nodes",
	lb.ModeIPIP:   "flows outlive changes of backends, if they send anything before the next change; lost LB nodes, but for what those alone had recorded",
	lb.ModeL2:     "flows outlive changes of backends, if they send anything before the next change; lost LB nodes, but for what those alone had recorded",
	lb.ModeNAT:    "flows outlive changes of backends; they end with the LB node that they go through",
}

func (a *Agent) serviceOf(f dataplane.FrontendState, wanted lb.Frontend, verdicts map[lb.ProbeID]health.Verdict) status.Service {
	s := status.Service{Namespace: wanted.Service.Namespace, Name: wanted.Service.Name, PortName: wanted.PortName,
		VIP: f.ID.VIP.String(), Port: f.ID.Port, Protocol: f.ID.Protocol.String(), Slots: f.Slots, Contested: f.Contested, ChangedAt: f.Changed, Moved: f.Moved, Counter: counter(f.Counter)}
	s.Keeps = keeps[wanted.Mode]
	if a.allOut[f.ID] {
		s.Problem = "every backend fails its health check: all of them are used, as if none did"
	}
	weights, byID := uint32(0), map[lb.BackendID]lb.Backend{}
	for _, b := range wanted.Backends {
		byID[b.ID] = b
		if b.State == lb.Active {
			weights += b.Weight
		}
	}
	for _, b := range f.Backends {
		want := byID[b.ID]
		row := status.Backend{Address: b.ID.Target.String(), Node: want.Node, Mode: string(b.ID.Mode), Wanted: want.State.String(),
			State: b.State, Slots: b.Slots, NextHop: "kernel", Counter: counter(b.Counter)}
		if b.ID.Tunnel.IsValid() {
			row.Tunnel = b.ID.Tunnel.String()
		}
		row.LeavingSince = a.leaving[leaving{f.ID, b.ID}]
		if !row.LeavingSince.IsZero() && a.census != nil {
			row.Flows = a.census.flowsOf(f.ID, b.ID)
		}
		switch {
		case b.ID.Mode == lb.ModeLocal:
			row.NextHop = "local"
		case b.NextHop:
			row.NextHop = "resolved"
		}
		if f.Slots > 0 {
			row.Share = float64(b.Slots) / float64(f.Slots)
		}
		if want.State == lb.Active && weights > 0 {
			row.WantedPart = float64(want.Weight) / float64(weights)
		}
		if row.WantedPart > 0 {
			s.Imbalance = max(s.Imbalance, row.Share/row.WantedPart)
		}
		if v, ok := verdicts[probeOf(wanted, lb.Backend{ID: b.ID})]; ok && v.Known {
			row.Check = "passes"
			if v.Problem != "" {
				row.Check = v.Problem
			}
			row.CheckedAt, row.CheckTime = v.Last, v.RTT.Seconds()
		}
		s.Backends = append(s.Backends, row)
	}
	return s
}

// counts names the counters that are above 0.
func counts(values []uint64, names []string) []status.Count {
	var all []status.Count
	for i, value := range values {
		if value > 0 && i < len(names) && names[i] != "" {
			all = append(all, status.Count{Name: names[i], Count: value})
		}
	}
	return all
}
