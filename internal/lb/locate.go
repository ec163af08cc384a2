// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"fmt"
	"net/netip"
	"slices"
)

// Unusable says why an address can be neither a backend, a node nor a VIP, for
// what it is alone; "" when it can.
func Unusable(a netip.Addr) string {
	switch {
	case a.Zone() != "":
		return "has a zone"
	case a.Is4In6():
		return "is an IPv4 address written as IPv6"
	case a.IsUnspecified():
		return "is the unspecified address"
	case a.IsLoopback(), a.Is4() && a.As4()[0] == 127:
		return "is a loopback address"
	case a.IsLinkLocalUnicast():
		return "is link-local, as metadata services are"
	case a.IsMulticast():
		return "is a multicast address"
	case a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240):
		return "is in a reserved block"
	}
	return ""
}

// Locator finds the nodes of endpoints.
type Locator struct {
	names    map[string]*Node
	prefixes map[netip.Prefix]*Node
	lengths  []int // of prefixes, longest first
}

// NewLocator returns a Locator of these nodes, which it keeps pointers to.
func NewLocator(nodes []Node) *Locator {
	l := &Locator{names: map[string]*Node{}, prefixes: map[netip.Prefix]*Node{}}
	seen := map[int]bool{}
	add := func(p netip.Prefix, n *Node) {
		l.prefixes[p] = n
		if bits := p.Bits(); !seen[bits] {
			seen[bits] = true
			l.lengths = append(l.lengths, bits)
		}
	}
	for i := range nodes {
		n := &nodes[i]
		l.names[n.Name] = n
		for _, p := range n.Pods {
			add(p, n)
		}
		// A server that holds the VIP may be known by its node's own address.
		for _, a := range n.TunnelAddresses {
			add(netip.PrefixFrom(a, a.BitLen()), n)
		}
	}
	slices.Sort(l.lengths)
	slices.Reverse(l.lengths)
	return l
}

// Named returns the node of a name, or nil.
func (l *Locator) Named(name string) *Node { return l.names[name] }

// Node returns the node of an endpoint: the one that it names, else the one
// that its address is of, else nil.
func (l *Locator) Node(e *Endpoint) *Node {
	if e.NodeName != "" {
		return l.names[e.NodeName]
	}
	for _, bits := range l.lengths {
		if p, err := e.Address.Prefix(bits); err == nil && l.prefixes[p] != nil {
			return l.prefixes[p]
		}
	}
	return nil
}

// Reach says how a packet to a VIP comes to an endpoint in a mode: the outer
// destinations to choose from, the best first, or what is wrong.
func (l *Locator) Reach(e *Endpoint, mode Mode, vip netip.Addr) (tunnels []netip.Addr, problem string) {
	node := l.Node(e)
	switch {
	case mode == ModeL2, mode == ModeNAT:
		return []netip.Addr{e.Address}, ""
	case mode == ModeIPIP && (node == nil || !node.Backend):
		// A plain server decapsulates by itself.
		tunnels = []netip.Addr{e.Address}
	case node == nil && e.NodeName != "":
		return nil, fmt.Sprintf("is on node %s, which is not described", e.NodeName)
	case node == nil:
		return nil, "is on no node that is described"
	case !node.Backend:
		return nil, fmt.Sprintf("is on node %s, which has not the role Backend", node.Name)
	default:
		tunnels = slices.Clone(node.TunnelAddresses)
	}
	// IPv6 in IPv4 is none of the tunnels that IPIP has.
	if mode == ModeIPIP && vip.Is6() {
		tunnels = slices.DeleteFunc(tunnels, netip.Addr.Is4)
		if len(tunnels) == 0 {
			return nil, "can be reached over IPv4 alone, and IPIP has no tunnel for IPv6 in IPv4"
		}
	}
	slices.SortStableFunc(tunnels, func(a, b netip.Addr) int {
		return boolToInt(a.Is4() != vip.Is4()) - boolToInt(b.Is4() != vip.Is4())
	})
	if len(tunnels) == 0 {
		return nil, fmt.Sprintf("is on node %s, which has no tunnel address", node.Name)
	}
	return tunnels, ""
}

func boolToInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
