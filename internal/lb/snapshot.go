// SPDX-License-Identifier: Apache-2.0

// Package lb says what is balanced (services, backends, nodes: a Snapshot) and
// what one node must do about it (a Plan), as plain values. It does no I/O and
// knows no Kubernetes types.
package lb

import (
	"fmt"
	"net/netip"
	"time"
)

// Protocol is an IP protocol number: TCP or UDP.
type Protocol uint8

// The protocols that a service can have.
const (
	TCP Protocol = 6
	UDP Protocol = 17
)

// String returns "TCP", "UDP", or the number.
func (p Protocol) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Mode is how packets reach a backend.
type Mode string

// The forwarding modes. ModeLocal is never configured: it is what a backend on
// the LB node itself gets.
const (
	ModeGeneve Mode = "Geneve"
	ModeIPIP   Mode = "IPIP"
	ModeL2     Mode = "L2"
	ModeNAT    Mode = "NAT"
	ModeLocal  Mode = "Local"
)

// Held says whether the server holds the VIP itself. Then nobody translates, and
// nobody can be asked which flows it has.
func (m Mode) Held() bool { return m == ModeIPIP || m == ModeL2 }

// Snapshot is all that is known, from one source at one moment. Slices are
// sorted by the key of their elements.
type Snapshot struct {
	Services []Service
	Nodes    []Node
	Pools    []AddressPool
}

// ServiceID names one Kubernetes Service.
type ServiceID struct {
	Namespace string
	Name      string
}

// String returns "namespace/name".
func (s ServiceID) String() string { return s.Namespace + "/" + s.Name }

// Service is one Service with its policy and its endpoints.
type Service struct {
	ID    ServiceID
	VIPs  []netip.Addr // sorted, no duplicates, never v4-mapped
	Ports []ServicePort
	// Endpoints of all slices, sorted by address. One address may stand there
	// several times, with other ports or conditions, as while it moves between
	// slices: for each port the readiest counts.
	Endpoints []Endpoint
	Policy    Policy
	// SourceRanges are the clients that may come, sorted; none: all may.
	SourceRanges []netip.Prefix
	// Affinity is how long the flows of one client go to the same backend after
	// the last; 0: each flow for itself.
	Affinity time.Duration
	// PublishNotReady counts endpoints that are not ready as ready.
	PublishNotReady bool
}

// ServicePort is one port of a Service. Name is "" when there is only one.
type ServicePort struct {
	Name     string
	Port     uint16
	Protocol Protocol
}

// Endpoint is one address of a Service, with the number that each named port
// of the Service has there.
type Endpoint struct {
	Address     netip.Addr
	Ports       map[PortKey]uint16
	NodeName    string // "" when unknown
	UID         string // of the Pod; "" when unknown
	Ready       bool   // nil in the slice means true
	Serving     bool   // nil in the slice means true
	Terminating bool
	Weight      uint32 // 1 unless the policy says otherwise
}

// PortKey names a Service's port within an EndpointSlice.
type PortKey struct {
	Name     string
	Protocol Protocol
}

// Policy is what a ServicePolicy says of a Service, defaults filled in.
type Policy struct {
	Name string // of the ServicePolicy; "" for the defaults
	Mode Mode   // as configured
	// TableSize fixes the number of slots (a power of two, 256 to 131072);
	// 0 derives it from the number of backends.
	TableSize uint32
	// SlotsPerBackend is how many slots a derived table has for each backend at
	// least; 0: as many as by default.
	SlotsPerBackend uint32
	// Independent: each datagram stands alone, as in DNS.
	Independent bool
	// DrainTimeout bounds how long a backend that takes no new flows keeps those
	// that it has; 0: until its endpoint goes.
	DrainTimeout time.Duration
	Check        Check
	Limits       Limits
	// CookiesFrom is how many SYNs a second a backend's port gets before they are
	// answered with SYN cookies; 0: never.
	CookiesFrom uint32
}

// Limits bound what clients may send to one port of a service, by way of one LB
// node.
type Limits struct {
	All       Rate
	PerClient Rate // each IPv4 address, or IPv6 /64
}

// Rate is so much in a second; 0 is no limit.
type Rate struct{ Connections, Packets, Bits uint64 }

// Node is one machine of the shard.
type Node struct {
	Name         string
	LoadBalancer bool
	Backend      bool
	// TunnelAddresses are where tunnel packets to this node go and, on an LB
	// node, come from: at most one of each family.
	TunnelAddresses []netip.Addr
	// IPIPSources are prefixes that the outer source of an LB node's ipip
	// packets varies in: at most one of each family, and none when it does not.
	IPIPSources []netip.Prefix
	// NATAddresses are what an LB node's packets to backends of ModeNAT come from:
	// up to 8 of each family.
	NATAddresses []netip.Addr
	// Pods are the addresses and subnets of the Pods on this node.
	Pods []netip.Prefix
}

// Tunnel returns the node's tunnel address of the same family as like, else
// its other one, else the zero Addr.
func (n *Node) Tunnel(like netip.Addr) netip.Addr {
	var other netip.Addr
	for _, a := range n.TunnelAddresses {
		if a.Is4() == like.Is4() {
			return a
		}
		other = a
	}
	return other
}

// AddressPool is a set of addresses that VIPs may be taken from.
type AddressPool struct {
	Name     string
	Prefixes []netip.Prefix
}

// Timeouts after which an idle flow is forgotten at its backend's node.
type Timeouts struct {
	TCP     time.Duration // established
	UDP     time.Duration // answered
	Closing time.Duration // TCP after a FIN or a reset
}
