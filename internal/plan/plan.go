// SPDX-License-Identifier: Apache-2.0

// Package plan computes exactly what one node must forward from all that is
// known. It is pure: the same snapshot gives the same plan.
package plan

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/maglev"
)

// The kinds of findings that only show when a plan is made.
var (
	UnknownNode = &lb.Rule{Code: "FL0401", Severity: lb.Error, Title: "this node is not described",
		Remedy: "add a Node of this name, or start the agent with --node and the right one"}
	Unreachable = &lb.Rule{Code: "FL0402", Severity: lb.Warning, Title: "an endpoint cannot be reached in the service's mode",
		Remedy: "describe its node (roles, tunnelAddresses, podSubnets), or choose another mode in a ServicePolicy; until then the endpoint gets nothing"}
	TooManyServed = &lb.Rule{Code: "FL0403", Severity: lb.Warning, Title: "one port of a Pod serves more VIPs and ports than a node can tell apart",
		Remedy: "give the Pod another port for some of the Services; until then it serves the first 8 alone"}
)

// Rules are all kinds of findings of this package.
var Rules = []*lb.Rule{UnknownNode, Unreachable, TooManyServed}

// servesMax is POD_SERVES_MAX of bpf/fairlead.h.
const servesMax = 8

// ForNode returns the plan of one node. Findings of severity Error mean that
// there is none.
func ForNode(s lb.Snapshot, node string) (lb.Plan, []lb.Finding) {
	p := planner{locate: lb.NewLocator(s.Nodes)}
	self := p.locate.Named(node)
	if self == nil {
		return lb.Plan{}, []lb.Finding{UnknownNode.At("Node "+node, "metadata.name", "no Node of this name is described")}
	}
	p.self = self
	p.examine(s.Services)
	plan := lb.Plan{Node: node, LoadBalancer: self.LoadBalancer, Backend: self.Backend,
		TunnelAddresses: self.TunnelAddresses, IPIPSources: self.IPIPSources}
	for i := range s.Services {
		p.service(&plan, &s.Services[i])
	}
	if self.LoadBalancer && slices.ContainsFunc(plan.Frontends, func(f lb.Frontend) bool { return f.Mode == lb.ModeNAT }) {
		plan.NATAddresses = self.NATAddresses
		if len(plan.NATAddresses) == 0 {
			plan.NATAddresses = self.TunnelAddresses
		}
	}
	slices.SortFunc(plan.Frontends, func(a, b lb.Frontend) int { return a.ID.Compare(b.ID) })
	if self.LoadBalancer {
		plan.Peers = peers(s.Nodes, self)
		plan.Probes = probes(plan.Frontends, s.Services)
		share(plan.Probes, node, s.Nodes)
	}
	if self.Backend {
		plan.Pods = p.pods(s.Services)
		plan.LBNodes = lbNodes(s.Nodes)
	}
	return plan, p.findings
}

type planner struct {
	self     *lb.Node
	locate   *lb.Locator
	vips     map[netip.Addr]bool
	cut      map[podKey]map[netip.AddrPort]bool // VIPs and ports that a Pod's port does not serve
	findings []lb.Finding
}

// examine finds what must be known of all services: their VIPs, and Pods' ports
// that serve too many of them. Every node cuts off the same.
func (p *planner) examine(services []lb.Service) {
	p.vips, p.cut = map[netip.Addr]bool{}, map[podKey]map[netip.AddrPort]bool{}
	served := map[podKey]*lb.Pod{}
	p.each(services, func(s *lb.Service, vip netip.Addr, port lb.ServicePort, c candidate) {
		serve(served, s, vip, port, c)
	})
	for i := range services {
		for _, vip := range services[i].VIPs {
			p.vips[vip] = true
		}
	}
	for key, pod := range served {
		if len(pod.Serves) <= servesMax {
			continue
		}
		p.findings = append(p.findings, TooManyServed.At("Service "+pod.Service.String(), "endpoints",
			"%s serves %d VIPs and ports", pod.Target, len(pod.Serves)))
		slices.SortFunc(pod.Serves, netip.AddrPort.Compare)
		p.cut[key] = map[netip.AddrPort]bool{}
		for _, front := range pod.Serves[servesMax:] {
			p.cut[key][front] = true
		}
	}
	slices.SortFunc(p.findings, func(a, b lb.Finding) int { return cmp.Compare(a.Problem, b.Problem) })
}

// each calls f with each endpoint of each VIP and port.
func (p *planner) each(services []lb.Service, f func(*lb.Service, netip.Addr, lb.ServicePort, candidate)) {
	for i := range services {
		s := &services[i]
		for _, vip := range s.VIPs {
			for _, port := range s.Ports {
				for _, c := range candidates(s, vip, port) {
					f(s, vip, port, c)
				}
			}
		}
	}
}

func (p *planner) service(plan *lb.Plan, s *lb.Service) {
	if !p.self.LoadBalancer {
		return
	}
	for _, vip := range s.VIPs {
		for _, port := range s.Ports {
			plan.Frontends = append(plan.Frontends, p.frontend(s, vip, port))
		}
	}
}

// candidate is an endpoint at the number that a service's port has there.
type candidate struct {
	target   netip.AddrPort
	endpoint *lb.Endpoint
	rank     rank
	state    lb.BackendState
}

// rank orders what an endpoint may be given, as KEP-1669 does.
type rank int

const (
	failing    rank = iota // keeps its TCP connections: not ready, or no more serving
	lastResort             // terminating, but still serving: new flows only if none is ready
	usableAlways
)

func rankOf(s *lb.Service, e *lb.Endpoint) rank {
	switch {
	case e.Ready || s.PublishNotReady:
		return usableAlways
	case e.Serving && e.Terminating:
		return lastResort
	}
	return failing
}

// candidates are the endpoints of a VIP's family that have the port, each
// address and port once: the readiest of several. Only if none is ready do those
// that are terminating but still serve take new flows.
func candidates(s *lb.Service, vip netip.Addr, port lb.ServicePort) []candidate {
	var all []candidate
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		number, ok := e.Ports[lb.PortKey{Name: port.Name, Protocol: port.Protocol}]
		if !ok || e.Address.Is4() != vip.Is4() {
			continue
		}
		all = append(all, candidate{target: netip.AddrPortFrom(e.Address, number), endpoint: e, rank: rankOf(s, e)})
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		return cmp.Or(a.target.Compare(b.target), cmp.Compare(b.rank, a.rank))
	})
	all = slices.CompactFunc(all, func(a, b candidate) bool { return a.target == b.target })
	anyReady := slices.ContainsFunc(all, func(c candidate) bool { return c.rank == usableAlways })
	for i := range all {
		all[i].state = lb.Active
		switch {
		case all[i].rank == failing:
			all[i].state = lb.Failing
		case all[i].rank == lastResort && anyReady:
			all[i].state = lb.Draining
		}
	}
	return all
}

// frontend chooses who takes new flows: the ready endpoints, and only if there
// is none, those that are terminating but still serve. All others keep what
// they have until their endpoint goes.
func (p *planner) frontend(s *lb.Service, vip netip.Addr, port lb.ServicePort) lb.Frontend {
	f := lb.Frontend{ID: lb.FrontendID{VIP: vip, Port: port.Port, Protocol: port.Protocol}, Service: s.ID, PortName: port.Name,
		Independent: s.Policy.Independent && port.Protocol == lb.UDP, Mode: s.Policy.Mode,
		DrainTimeout: s.Policy.DrainTimeout, SourceRanges: rangesFor(s.SourceRanges, vip), Affinity: s.Affinity, Limits: s.Policy.Limits}
	for _, c := range candidates(s, vip, port) {
		if p.cut[podKey{c.target, port.Protocol}][netip.AddrPortFrom(vip, port.Port)] {
			continue
		}
		id, problem := p.reach(s, vip, port, c)
		if problem != "" {
			p.findings = append(p.findings, Unreachable.At("Service "+s.ID.String(), "endpoints", "%s %s", c.target, problem))
			continue
		}
		backend := lb.Backend{ID: id, Weight: c.endpoint.Weight, State: c.state}
		if node := p.locate.Node(c.endpoint); node != nil {
			backend.Node = node.Name
		}
		f.Backends = append(f.Backends, backend)
	}
	if len(f.Backends) > 0 {
		f.TableSize = s.Policy.TableSize
		if f.TableSize == 0 {
			f.TableSize = maglev.SizeFor(len(f.Backends), int(cmp.Or(s.Policy.SlotsPerBackend, maglev.SlotsPerBackend)))
		}
	}
	return f
}

// rangesFor are those of a VIP's family. As kube-proxy does, a VIP is open to all
// when there are none of its own.
func rangesFor(all []netip.Prefix, vip netip.Addr) []netip.Prefix {
	var of []netip.Prefix
	for _, p := range all {
		if p.Addr().Is4() == vip.Is4() {
			of = append(of, p)
		}
	}
	return of
}

// reach says how this node's packets come to an endpoint.
func (p *planner) reach(s *lb.Service, vip netip.Addr, port lb.ServicePort, c candidate) (lb.BackendID, string) {
	id := lb.BackendID{Target: c.target, UID: c.endpoint.UID, Mode: s.Policy.Mode}
	if why := lb.Unusable(c.target.Addr()); why != "" {
		return id, why + ", and no backend"
	}
	if p.vips[c.target.Addr()] {
		return id, "is a VIP, and no backend"
	}
	if p.locate.Node(c.endpoint) == p.self && p.self.Backend {
		id.Mode, id.Local = lb.ModeLocal, c.target
		if s.Policy.Mode.Held() {
			id.Local = netip.AddrPortFrom(vip, port.Port)
		}
		return id, ""
	}
	tunnels, problem := p.locate.Reach(c.endpoint, s.Policy.Mode, vip)
	if problem != "" {
		return id, problem
	}
	for _, tunnel := range tunnels {
		// The outer source must be of the same family.
		if own := p.self.Tunnel(tunnel); own.IsValid() && own.Is4() == tunnel.Is4() {
			id.Tunnel = tunnel
			return id, ""
		}
	}
	return id, "has no tunnel address of a family that node " + p.self.Name + " has one of"
}

type podKey struct {
	target netip.AddrPort
	proto  lb.Protocol
}

// pods are this node's targets, whatever their condition: flows that they have
// are answered until the endpoint is gone.
func (p *planner) pods(services []lb.Service) []lb.Pod {
	found, affinity := map[podKey]*lb.Pod{}, map[podKey]map[netip.AddrPort]time.Duration{}
	p.each(services, func(s *lb.Service, vip netip.Addr, port lb.ServicePort, c candidate) {
		front := netip.AddrPortFrom(vip, port.Port)
		if p.locate.Node(c.endpoint) != p.self || p.cut[podKey{c.target, port.Protocol}][front] || lb.Unusable(c.target.Addr()) != "" || p.vips[c.target.Addr()] {
			return
		}
		key := serve(found, s, vip, port, c)
		if s.Affinity > 0 && c.state == lb.Active {
			if affinity[key] == nil {
				affinity[key] = map[netip.AddrPort]time.Duration{}
			}
			affinity[key][front] = s.Affinity
		}
	})
	p.each(services, func(s *lb.Service, vip netip.Addr, port lb.ServicePort, c candidate) {
		to, proto := probedAt(s.Policy, vip, port, c.target)
		at := candidate{target: netip.AddrPortFrom(c.target.Addr(), to.Port()), endpoint: c.endpoint}
		pod := found[podKey{at.target, proto}]
		if to.Port() == port.Port && proto == port.Protocol || p.locate.Node(c.endpoint) != p.self || lb.Unusable(c.target.Addr()) != "" || p.vips[c.target.Addr()] ||
			pod != nil && len(pod.Serves) >= servesMax {
			return // the traffic's own, not here, or no room for more than the traffic
		}
		serve(found, s, vip, lb.ServicePort{Port: to.Port(), Protocol: proto}, at)
	})
	pods := make([]lb.Pod, 0, len(found))
	for key, pod := range found {
		slices.SortFunc(pod.Serves, netip.AddrPort.Compare)
		for _, front := range pod.Serves {
			if len(affinity[key]) > 0 {
				pod.Affinity = append(pod.Affinity, affinity[key][front])
			}
		}
		pods = append(pods, *pod)
	}
	slices.SortFunc(pods, func(a, b lb.Pod) int {
		return cmp.Or(a.Target.Compare(b.Target), cmp.Compare(a.Protocol, b.Protocol))
	})
	return pods
}

// serve notes that an endpoint serves a VIP and port, and returns its key.
func serve(found map[podKey]*lb.Pod, s *lb.Service, vip netip.Addr, port lb.ServicePort, c candidate) podKey {
	front, target := netip.AddrPortFrom(vip, port.Port), c.target
	if s.Policy.Mode.Held() {
		target = front // the server holds the VIP itself
	}
	key := podKey{target, port.Protocol}
	pod := found[key]
	if pod == nil {
		pod = &lb.Pod{Target: target, Protocol: port.Protocol, Service: s.ID, UID: c.endpoint.UID}
		found[key] = pod
	}
	if n := s.Policy.CookiesFrom; port.Protocol == lb.TCP && n > 0 && (pod.CookiesFrom == 0 || n < pod.CookiesFrom) {
		pod.CookiesFrom = n
	}
	if !slices.Contains(pod.Serves, front) {
		pod.Serves = append(pod.Serves, front)
	}
	return key
}

// peers are the other LB nodes that can be reached.
func peers(nodes []lb.Node, self *lb.Node) []lb.Peer {
	var all []lb.Peer
	for i := range nodes {
		n := &nodes[i]
		if !n.LoadBalancer || n.Name == self.Name {
			continue
		}
		for _, own := range self.TunnelAddresses {
			if a := n.Tunnel(own); a.IsValid() && a.Is4() == own.Is4() {
				all = append(all, lb.Peer{Node: n.Name, Address: a})
				break
			}
		}
	}
	slices.SortFunc(all, func(a, b lb.Peer) int { return cmp.Compare(a.Node, b.Node) })
	return all
}

// lbNodes are the sources that tunnels may come from.
func lbNodes(nodes []lb.Node) []lb.LBNode {
	var found []lb.LBNode
	for _, n := range nodes {
		if !n.LoadBalancer {
			continue
		}
		for _, addr := range n.TunnelAddresses {
			found = append(found, lb.LBNode{Prefix: netip.PrefixFrom(addr, addr.BitLen()), Node: n.Name})
		}
		for _, prefix := range n.IPIPSources {
			found = append(found, lb.LBNode{Prefix: prefix.Masked(), Node: n.Name})
		}
	}
	slices.SortFunc(found, func(a, b lb.LBNode) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Node, b.Node))
	})
	return found
}
