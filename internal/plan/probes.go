// SPDX-License-Identifier: Apache-2.0

package plan

import (
	"cmp"
	"hash/fnv"
	"io"
	"net/netip"
	"slices"

	"fairlead.dev/fairlead/internal/lb"
)

// probes are what an LB node probes: each backend that could take new flows,
// once for each service that asks for it.
func probes(frontends []lb.Frontend, services []lb.Service) []lb.Probe {
	policies := map[lb.ServiceID]lb.Policy{}
	for i := range services {
		policies[services[i].ID] = services[i].Policy
	}
	found := map[lb.ProbeID]bool{}
	var all []lb.Probe
	for _, f := range frontends {
		policy := policies[f.Service]
		if policy.Check.Kind == "" {
			continue
		}
		for _, b := range f.Backends {
			p := lb.Probe{ID: lb.ProbeID{Service: f.Service, Target: b.ID.Target, Protocol: f.ID.Protocol}, Check: policy.Check, Via: b.ID, Tunneled: b.ID.Mode != lb.ModeNAT}
			if b.State != lb.Active || found[p.ID] {
				continue
			}
			found[p.ID] = true
			p.Address, _ = probedAt(policy, f.ID.VIP, lb.ServicePort{Port: f.ID.Port, Protocol: f.ID.Protocol}, b.ID.Target)
			switch b.ID.Mode {
			case lb.ModeLocal:
				p.Tunneled = false
				p.Address = netip.AddrPortFrom(b.ID.Local.Addr(), cmp.Or(policy.Check.Port, b.ID.Local.Port()))
			case lb.ModeNAT:
				p.Address = netip.AddrPortFrom(b.ID.Target.Addr(), cmp.Or(policy.Check.Port, b.ID.Target.Port()))
			}
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b lb.Probe) int {
		return cmp.Or(cmp.Compare(a.ID.Service.Namespace, b.ID.Service.Namespace), cmp.Compare(a.ID.Service.Name, b.ID.Service.Name),
			a.ID.Target.Compare(b.ID.Target), cmp.Compare(a.ID.Protocol, b.ID.Protocol))
	})
	return all
}

// probedAt is the VIP and port that a probe is sent to, and its protocol: where
// the traffic goes, unless the check asks for another port or protocol; then
// the VIP at the port that is probed.
func probedAt(policy lb.Policy, vip netip.Addr, port lb.ServicePort, target netip.AddrPort) (netip.AddrPort, lb.Protocol) {
	proto := lb.TCP
	if policy.Check.Kind == lb.CheckUDP {
		proto = lb.UDP
	}
	switch {
	case policy.Check.Kind == "", proto == port.Protocol && (policy.Check.Port == 0 || policy.Check.Port == target.Port()):
		return netip.AddrPortFrom(vip, port.Port), port.Protocol
	case policy.Check.Port != 0:
		return netip.AddrPortFrom(vip, policy.Check.Port), proto
	}
	return netip.AddrPortFrom(vip, target.Port()), proto
}

// share says which probes other LB nodes do: each backend is probed by the few
// that rendezvous hashing ranks first, the same wherever it is computed.
func share(probes []lb.Probe, self string, nodes []lb.Node) {
	for i := range probes {
		p := &probes[i]
		if p.Check.Probers == 0 {
			continue
		}
		mine, before := preference(p.ID, self), 0
		for _, n := range nodes {
			if n.LoadBalancer && n.Name != self && preference(p.ID, n.Name) > mine {
				before++
			}
		}
		p.Elsewhere = before >= p.Check.Probers
	}
}

func preference(id lb.ProbeID, node string) uint64 {
	h := fnv.New64a()
	_, _ = io.WriteString(h, id.String()+" "+node)
	// FNV's upper bits hardly depend on its last bytes.
	x := h.Sum64()
	x ^= x >> 32
	x *= 0x9e3779b97f4a7c15
	return x ^ x>>29
}
