// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"time"
)

// Plan is exactly what one node must do: plain, sorted, comparable values, and
// small enough to print and diff as text.
type Plan struct {
	Node string
	// LoadBalancer and Backend are the node's roles.
	LoadBalancer bool
	Backend      bool
	// TunnelAddresses and IPIPSources are the node's own.
	TunnelAddresses []netip.Addr
	IPIPSources     []netip.Prefix
	NATAddresses    []netip.Addr // where any frontend's mode is NAT

	// Frontends is what an LB node balances, sorted by VIP, port, protocol.
	Frontends []Frontend
	// Pods is what a backend's node delivers to, sorted by target, protocol.
	Pods []Pod
	// LBNodes are the sources that a backend's node accepts tunnels from,
	// sorted by prefix.
	LBNodes []LBNode
	// Peers are the other LB nodes, which an LB node tells what it recorded,
	// sorted by name.
	Peers []Peer
	// Probes are what an LB node probes, sorted by service, target, protocol.
	Probes []Probe
}

// FrontendID is where clients connect.
type FrontendID struct {
	VIP      netip.Addr
	Port     uint16
	Protocol Protocol
}

// String returns e.g. "192.0.2.1:80/TCP".
func (f FrontendID) String() string {
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.VIP, f.Port), f.Protocol)
}

// Compare orders frontends by VIP, port and protocol.
func (f FrontendID) Compare(other FrontendID) int {
	return cmp.Or(f.VIP.Compare(other.VIP), cmp.Compare(f.Port, other.Port), cmp.Compare(f.Protocol, other.Protocol))
}

// Frontend is one VIP, port and protocol of a service, and its backends.
type Frontend struct {
	ID          FrontendID
	Service     ServiceID
	PortName    string
	Independent bool
	Mode        Mode // of its policy, never ModeLocal
	// DrainTimeout is how long a backend may be in another state than Active; 0:
	// as long as it likes.
	DrainTimeout time.Duration
	SourceRanges []netip.Prefix
	Affinity     time.Duration
	Limits       Limits
	// TableSize is the number of slots: a power of two, 256 to 131072, or 0
	// when there is no backend at all.
	TableSize uint32
	// Backends are sorted by target; those that take no new flows included.
	Backends []Backend
}

// BackendState says what a backend may still be given.
type BackendState uint8

// The states of a backend. A backend that is gone is not in the plan.
const (
	Active   BackendState = iota + 1 // takes new flows
	Draining                         // keeps the flows that it has
	Failing                          // keeps the TCP flows that it has
)

// String returns "active", "draining" or "failing".
func (s BackendState) String() string {
	switch s {
	case Active:
		return "active"
	case Draining:
		return "draining"
	case Failing:
		return "failing"
	}
	return fmt.Sprintf("state %d", uint8(s))
}

// BackendID is one incarnation of an address and port, and how to reach it.
// Backends of several frontends with the same BackendID are one backend.
//
// Invariant: Target and UID are the same on every LB node, and so are what the
// keys of lookup tables are made of; Tunnel, Mode and Local are this node's.
type BackendID struct {
	Target netip.AddrPort // the Pod; in mode ipip the server itself
	Tunnel netip.Addr     // outer destination, in ModeL2 and ModeNAT the target; zero in ModeLocal
	Mode   Mode
	UID    string // of the Pod; "" when unknown
	// Local is ModeLocal's key into Pods: Target, or the frontend's own VIP and
	// port when the server holds the VIP. Zero in other modes.
	Local netip.AddrPort
}

// Backend is one backend of a frontend.
type Backend struct {
	ID     BackendID
	Node   string // "" when unknown
	Weight uint32 // 0 takes no new flows
	State  BackendState
}

// Pod is one address, port and protocol of this node, and what it serves.
// In mode ipip the server holds the VIP: Target is then the VIP itself.
type Pod struct {
	Target   netip.AddrPort
	Protocol Protocol
	Serves   []netip.AddrPort // VIPs and ports, sorted, 1 to 8
	Service  ServiceID        // the first that it serves
	UID      string           // of the Pod, "" when unknown: another has none of its flows
	// Affinity is that of each of Serves. A Pod that takes no new flows has none.
	Affinity []time.Duration
	// CookiesFrom is as in Policy, the least of all that it serves.
	CookiesFrom uint32
}

// LBNode is a source of tunnel packets.
type LBNode struct {
	Prefix netip.Prefix
	Node   string
}

// Peer is another LB node's agent.
type Peer struct {
	Node    string
	Address netip.Addr // its tunnel address, of a family that this node has too
}

// NextHop is how the first packet toward an address leaves this node.
type NextHop struct {
	Interface int // index of the device that carries XDP, never a VLAN device
	Source    HardwareAddr
	Target    HardwareAddr
	VLAN      uint16 // VLAN id to tag with; 0: none
	MTU       uint16 // of the route
}

// HardwareAddr is an Ethernet address, comparable.
type HardwareAddr [6]byte

// String returns e.g. "02:00:00:00:00:01".
func (h HardwareAddr) String() string { return net.HardwareAddr(h[:]).String() }

// Finding is one thing wrong with the configuration: what, where, and what to
// do about it. An Error keeps the last good state; a Warning does not.
type Finding struct {
	Code     string // stable, e.g. "FL0012"
	Severity Severity
	File     string // "" when not from a file
	Line     int    // 0 when unknown
	Object   string // e.g. "Service default/web"
	Field    string // e.g. "spec.ports[0].port"
	Problem  string
	Remedy   string
}

// Severity of a Finding.
type Severity string

// The severities of a Finding.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
)

// Error returns the finding in one line.
func (f Finding) Error() string {
	s := ""
	if f.File != "" {
		s = f.File + ":"
		if f.Line > 0 {
			s += fmt.Sprintf("%d:", f.Line)
		}
		s += " "
	}
	s += fmt.Sprintf("%s: %s %s: ", f.Severity, f.Code, f.Object)
	if f.Field != "" {
		s += f.Field + ": "
	}
	return s + f.Problem + "; " + f.Remedy
}
