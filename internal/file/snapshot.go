// SPDX-License-Identifier: Apache-2.0

package file

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.dev/fairlead/api/v1alpha1"
	"fairlead.dev/fairlead/internal/lb"
)

const (
	kindService = "v1 Service"
	kindSlice   = "discovery.k8s.io/v1 EndpointSlice"
	kindNode    = v1alpha1.APIVersion + " Node"
	kindPool    = v1alpha1.APIVersion + " AddressPool"
	kindPolicy  = v1alpha1.APIVersion + " ServicePolicy"
)

// kinds are the objects that are read; each is a value to decode into.
var kinds = map[string]func() any{
	kindService: func() any { return new(corev1.Service) },
	kindSlice:   func() any { return new(discoveryv1.EndpointSlice) },
	kindNode:    func() any { return new(v1alpha1.Node) },
	kindPool:    func() any { return new(v1alpha1.AddressPool) },
	kindPolicy:  func() any { return new(v1alpha1.ServicePolicy) },
}

var namespaced = map[string]bool{kindService: true, kindSlice: true, kindPolicy: true}

// builder puts a snapshot together. Objects that are wrong are left out of it;
// their findings say that it must not be used.
type builder struct {
	snapshot lb.Snapshot
	services map[lb.ServiceID]*service
	order    []*service
	nodes    []ownedNode
}

type ownedNode struct {
	lb.Node
	object *object
}

type service struct {
	lb.Service
	object   *object
	policied *object
	weights  []weight
	slices   bool // any EndpointSlice names it
}

func (l *loader) snapshot() lb.Snapshot {
	b := &builder{services: map[lb.ServiceID]*service{}}
	for _, kind := range []string{kindNode, kindPool, kindService, kindPolicy, kindSlice} {
		for _, o := range l.objects {
			if o.kind != kind {
				continue
			}
			value := kinds[kind]()
			if o.into(value) {
				b.add(o, value)
			}
		}
	}
	b.checkNodes()
	b.finish()
	return b.snapshot
}

func (b *builder) add(o *object, value any) {
	switch v := value.(type) {
	case *v1alpha1.Node:
		b.addNode(o, v)
	case *v1alpha1.AddressPool:
		b.addPool(o, v)
	case *corev1.Service:
		b.addService(o, v)
	case *v1alpha1.ServicePolicy:
		b.addPolicy(o, v)
	case *discoveryv1.EndpointSlice:
		b.addSlice(o, v)
	}
}

// address reads one that can be a VIP, a node or an endpoint.
func (o *object) address(text, field string, rule *lb.Rule) (netip.Addr, bool) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		o.find(badAddress, field, "%q is not an address", text)
		return addr, false
	}
	if why := lb.Unusable(addr); why != "" {
		o.find(rule, field, "%s %s", text, why)
		return addr, false
	}
	return addr, true
}

func (o *object) prefix(text, field string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(text)
	if err != nil || p.Addr().Is4In6() {
		o.find(badPrefix, field, "%q is not a prefix", text)
		return p, false
	}
	if p != p.Masked() {
		o.find(badPrefix, field, "%s has bits set behind its length; %s has not", text, p.Masked())
		return p, false
	}
	return p, true
}

func (b *builder) addNode(o *object, v *v1alpha1.Node) {
	n := lb.Node{Name: v.Name}
	for i, role := range v.Spec.Roles {
		switch role {
		case v1alpha1.RoleLoadBalancer:
			n.LoadBalancer = true
		case v1alpha1.RoleBackend:
			n.Backend = true
		default:
			o.find(badRole, fmt.Sprintf("spec.roles[%d]", i), "%q", role)
		}
	}
	if len(v.Spec.Roles) == 0 {
		o.find(badRole, "spec.roles", "empty")
	}
	families := map[bool]int{}
	for i, text := range v.Spec.TunnelAddresses {
		if addr, ok := o.address(text, fmt.Sprintf("spec.tunnelAddresses[%d]", i), badAddress); ok {
			n.TunnelAddresses = append(n.TunnelAddresses, addr)
			families[addr.Is4()]++
		}
	}
	if len(v.Spec.TunnelAddresses) == 0 || families[true] > 1 || families[false] > 1 {
		o.find(badTunnel, "spec.tunnelAddresses", "%d of IPv4 and %d of IPv6", families[true], families[false])
	}
	sources := map[bool]int{}
	for i, text := range v.Spec.IPIPSourcePrefixes {
		if p, ok := o.prefix(text, fmt.Sprintf("spec.ipipSourcePrefixes[%d]", i)); ok {
			n.IPIPSources = append(n.IPIPSources, p)
			if sources[p.Addr().Is4()]++; sources[p.Addr().Is4()] > 1 {
				o.find(badPrefix, fmt.Sprintf("spec.ipipSourcePrefixes[%d]", i), "%s is the second of its family", text)
			}
		}
	}
	for i, text := range v.Spec.NATAddresses {
		if addr, ok := o.address(text, fmt.Sprintf("spec.natAddresses[%d]", i), badAddress); ok {
			n.NATAddresses = append(n.NATAddresses, addr)
		}
	}
	if count := len(n.NATAddresses); count > 16 {
		o.find(badTunnel, "spec.natAddresses", "%d are more than 8 of each family", count)
	}
	for i, text := range v.Spec.PodAddresses {
		if addr, ok := o.address(text, fmt.Sprintf("spec.podAddresses[%d]", i), badAddress); ok {
			n.Pods = append(n.Pods, netip.PrefixFrom(addr, addr.BitLen()))
		}
	}
	for i, text := range v.Spec.PodSubnets {
		if p, ok := o.prefix(text, fmt.Sprintf("spec.podSubnets[%d]", i)); ok {
			n.Pods = append(n.Pods, p)
		}
	}
	slices.SortFunc(n.TunnelAddresses, netip.Addr.Compare)
	b.nodes = append(b.nodes, ownedNode{n, o})
}

// checkNodes finds addresses that two nodes claim.
func (b *builder) checkNodes() {
	for i, n := range b.nodes {
		for _, other := range b.nodes[:i] {
			for _, a := range n.TunnelAddresses {
				if slices.Contains(other.TunnelAddresses, a) {
					n.object.find(overlap, "spec.tunnelAddresses", "%s is also of Node %s", a, other.Name)
				}
			}
			for _, p := range n.Pods {
				for _, q := range other.Pods {
					if p.Overlaps(q) {
						n.object.find(overlap, "spec.podSubnets", "%s overlaps %s of Node %s", p, q, other.Name)
					}
				}
			}
		}
		b.snapshot.Nodes = append(b.snapshot.Nodes, n.Node)
	}
}

func (b *builder) addPool(o *object, v *v1alpha1.AddressPool) {
	pool := lb.AddressPool{Name: v.Name}
	for i, text := range v.Spec.Addresses {
		prefixes, err := parseRange(text)
		if err != nil {
			o.find(badPrefix, fmt.Sprintf("spec.addresses[%d]", i), "%v", err)
			continue
		}
		for _, other := range b.snapshot.Pools {
			for _, p := range prefixes {
				if slices.ContainsFunc(other.Prefixes, p.Overlaps) {
					o.find(overlap, fmt.Sprintf("spec.addresses[%d]", i), "%s overlaps AddressPool %s", text, other.Name)
				}
			}
		}
		pool.Prefixes = append(pool.Prefixes, prefixes...)
	}
	b.snapshot.Pools = append(b.snapshot.Pools, pool)
}

// finish checks what only shows when everything is known.
func (b *builder) finish() {
	slices.SortFunc(b.order, func(x, y *service) int {
		return cmp.Or(strings.Compare(x.ID.Namespace, y.ID.Namespace), strings.Compare(x.ID.Name, y.ID.Name))
	})
	slices.SortFunc(b.snapshot.Nodes, func(x, y lb.Node) int { return strings.Compare(x.Name, y.Name) })
	slices.SortFunc(b.snapshot.Pools, func(x, y lb.AddressPool) int { return strings.Compare(x.Name, y.Name) })
	owners, forbidden := map[lb.FrontendID]*service{}, b.forbidden()
	for _, s := range b.order {
		b.checkVIPs(s, owners)
		s.checkRanges()
		s.checkEndpoints(forbidden)
		b.snapshot.Services = append(b.snapshot.Services, s.Service)
	}
}

// forbidden are the addresses that no endpoint may have, and what they are.
func (b *builder) forbidden() map[netip.Addr]string {
	all := map[netip.Addr]string{}
	for _, n := range b.nodes {
		if !n.LoadBalancer {
			continue // a server that holds the VIP is reached at its node's address
		}
		for _, a := range n.TunnelAddresses {
			all[a] = "is the address of LB node " + n.Name
		}
	}
	for _, s := range b.order {
		for _, vip := range s.VIPs {
			all[vip] = "is a VIP of Service " + s.ID.String()
		}
	}
	return all
}

func (b *builder) checkVIPs(s *service, owners map[lb.FrontendID]*service) {
	for _, vip := range s.VIPs {
		inPool := slices.ContainsFunc(b.snapshot.Pools, func(p lb.AddressPool) bool {
			return slices.ContainsFunc(p.Prefixes, func(prefix netip.Prefix) bool { return prefix.Contains(vip) })
		})
		if !inPool {
			s.object.find(outsidePools, s.vipField(), "%s", vip)
		}
		for i, port := range s.Ports {
			id := lb.FrontendID{VIP: vip, Port: port.Port, Protocol: port.Protocol}
			if other := owners[id]; other != nil && other != s {
				s.object.find(duplicatePort, fmt.Sprintf("spec.ports[%d]", i), "%s is already of Service %s (%s, line %d)", id, other.ID, other.object.file, other.object.line)
			}
			owners[id] = s
		}
	}
}

func (s *service) vipField() string {
	if _, ok := s.object.lines["status.loadBalancer.ingress"]; ok {
		return "status.loadBalancer.ingress"
	}
	return "metadata.annotations." + v1alpha1.AddressesAnnotation
}
