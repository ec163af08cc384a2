// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"fmt"
	"strings"

	"fairlead.dev/fairlead/internal/lb"
)

// Format writes a plan as text, one thing a line, for people and for diffs.
func Format(p lb.Plan) string {
	var b strings.Builder
	fmt.Fprintf(&b, "node %s", p.Node)
	if p.LoadBalancer {
		b.WriteString(" load-balancer")
	}
	if p.Backend {
		b.WriteString(" backend")
	}
	fmt.Fprintf(&b, " tunnel %v ipip-sources %v", p.TunnelAddresses, p.IPIPSources)
	if len(p.NATAddresses) > 0 {
		fmt.Fprintf(&b, " nat %v", p.NATAddresses)
	}
	b.WriteString("\n")
	for _, f := range p.Frontends {
		fmt.Fprintf(&b, "frontend %s service %s port %q slots %d", f.ID, f.Service, f.PortName, f.TableSize)
		if f.Independent {
			b.WriteString(" independent")
		}
		if f.Affinity > 0 {
			fmt.Fprintf(&b, " affinity %s", f.Affinity)
		}
		if len(f.SourceRanges) > 0 {
			fmt.Fprintf(&b, " from %v", f.SourceRanges)
		}
		if f.Limits != (lb.Limits{}) {
			fmt.Fprintf(&b, " limits %+v", f.Limits)
		}
		b.WriteString("\n")
		for _, backend := range f.Backends {
			fmt.Fprintf(&b, "  backend %s %s %s", backend.ID.Target, strings.ToLower(string(backend.ID.Mode)), backend.State)
			if backend.ID.Tunnel.IsValid() {
				fmt.Fprintf(&b, " tunnel %s", backend.ID.Tunnel)
			}
			fmt.Fprintf(&b, " node %q weight %d\n", backend.Node, backend.Weight)
		}
	}
	for _, pod := range p.Pods {
		fmt.Fprintf(&b, "pod %s/%s serves %v", pod.Target, pod.Protocol, pod.Serves)
		if len(pod.Affinity) > 0 {
			fmt.Fprintf(&b, " affinity %v", pod.Affinity)
		}
		if pod.CookiesFrom > 0 {
			fmt.Fprintf(&b, " cookies from %d", pod.CookiesFrom)
		}
		b.WriteString("\n")
	}
	for _, probe := range p.Probes {
		fmt.Fprintf(&b, "probe %s %s at %s", probe.ID, probe.Check.Kind, probe.Address)
		if !probe.Tunneled {
			b.WriteString(" direct")
		}
		if probe.Elsewhere {
			b.WriteString(" elsewhere")
		}
		b.WriteString("\n")
	}
	for _, n := range p.Peers {
		fmt.Fprintf(&b, "peer %s %s\n", n.Node, n.Address)
	}
	for _, n := range p.LBNodes {
		fmt.Fprintf(&b, "lb-node %s %s\n", n.Prefix, n.Node)
	}
	return b.String()
}
