// SPDX-License-Identifier: Apache-2.0

package lb

import (
	"fmt"
	"net/netip"
	"time"
)

// CheckKind is how a backend is asked whether it works.
type CheckKind string

// The kinds of checks; the zero value is none.
const (
	CheckTCP   CheckKind = "TCP"   // it accepts a connection
	CheckHTTP  CheckKind = "HTTP"  // it answers a GET with an expected code
	CheckHTTPS CheckKind = "HTTPS" // the same over TLS
	CheckGRPC  CheckKind = "GRPC"  // grpc.health.v1.Health/Check says SERVING
	CheckUDP   CheckKind = "UDP"   // it answers Send with what begins with Expect
)

// Check is how the backends of a service are probed. The zero Check is none.
type Check struct {
	Kind CheckKind
	// Port of the backend that is probed; 0: the one that takes the traffic.
	Port uint16
	// Path, Host and Codes are for HTTP and HTTPS. Host is also the name that
	// the certificate must be for; "": any certificate will do.
	Path, Host string
	Codes      []CodeRange
	// GRPCService is the service that a gRPC check asks about; "": all.
	GRPCService string
	// Send and Expect are for UDP.
	Send, Expect []byte

	Interval, Timeout time.Duration
	// Rise and Fall are how many probes in a row change the verdict.
	Rise, Fall int
	// Probers is how many LB nodes probe each backend; 0: all.
	Probers int
	// Reset says that a failing check ends the TCP connections too.
	Reset bool
}

// CodeRange is HTTP status codes, both ends included.
type CodeRange struct{ From, To int }

// ProbeID names who is probed: a backend, as one service has it.
type ProbeID struct {
	Service  ServiceID
	Target   netip.AddrPort // of the backend
	Protocol Protocol       // of the traffic
}

// String returns e.g. "default/web 10.1.0.5:8080/TCP".
func (p ProbeID) String() string { return fmt.Sprintf("%s %s/%s", p.Service, p.Target, p.Protocol) }

// Probe is one backend to be probed, and how.
type Probe struct {
	ID    ProbeID
	Check Check
	// Address is what is connected to: the VIP and the port to be probed, where
	// the packets travel as the traffic does; the backend itself otherwise.
	Address netip.AddrPort
	// Via is the backend that packets from the probe's socket are sent to, and
	// Tunneled whether they need to be: not in mode NAT, nor on this node.
	Via      BackendID
	Tunneled bool
	// Elsewhere says that other LB nodes do it, and tell.
	Elsewhere bool
}
