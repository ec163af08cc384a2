// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// ServicePolicy says how Services of its own namespace are balanced, which the
// Service object cannot say. At most one policy targets a Service.
type ServicePolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ServicePolicySpec `json:"spec"`
}

// ServicePolicySpec describes a ServicePolicy.
type ServicePolicySpec struct {
	// TargetRefs name the Services, at least one.
	TargetRefs []TargetRef `json:"targetRefs"`

	// Mode is how packets reach the backends. Geneve, the default, needs the
	// agent on the backend's node; with IPIP the server holds the VIP itself,
	// and so it does with L2, on the LB nodes' own segment. With NAT the backend
	// needs nothing: it sees an LB node's address, answers come back through that
	// node, and the connections end with it.
	Mode Mode `json:"mode,omitempty"`

	// Datagrams says whether the UDP packets of one client port belong together
	// (Stream, the default) or each stands alone (Independent), as in DNS.
	Datagrams Datagrams `json:"datagrams,omitempty"`

	// TableSize fixes the number of slots of each port: a power of two from
	// 256 to 131072. By default, or 0, it follows the number of backends.
	TableSize int64 `json:"tableSize,omitempty"`

	// SlotsPerBackend is how many slots a table whose size follows the number of
	// backends has for each of them at least: 10 to 1000, by default 100. The
	// more, the fewer flow hashes change backends beside those that must.
	SlotsPerBackend int64 `json:"slotsPerBackend,omitempty"`

	// Drain says how backends that are leaving are treated.
	Drain Drain `json:"drain,omitempty"`

	// HealthCheck says how LB nodes probe the backends. By default they do not,
	// and an endpoint's own conditions decide.
	HealthCheck *HealthCheck `json:"healthCheck,omitempty"`

	// Limits bound what clients may send to each port of the Services. What is
	// beyond them is dropped.
	Limits *Limits `json:"limits,omitempty"`

	// SYNCookies protect servers from floods of SYNs.
	SYNCookies SYNCookies `json:"synCookies,omitempty"`

	// Weights say how many new flows backends get beside each other. The first
	// that matches an endpoint counts; without one its weight is 1.
	Weights []Weight `json:"weights,omitempty"`
}

// HealthCheck says how backends are probed: through the same tunnel as the
// traffic, at the VIP (but in mode NAT).
type HealthCheck struct {
	// Kind is TCP, HTTP, HTTPS, GRPC or UDP.
	Kind HealthCheckKind `json:"kind"`

	// Port of the backends that is probed. By default the one that takes the
	// traffic.
	Port int32 `json:"port,omitempty"`

	// Path is what HTTP and HTTPS get, by default "/".
	Path string `json:"path,omitempty"`

	// Host is the Host header of HTTP and HTTPS. With HTTPS the certificate must
	// be valid for it; without it, any certificate will do.
	Host string `json:"host,omitempty"`

	// Codes are the HTTP status codes that are expected, e.g. "200" or
	// "200-299". By default 200-399.
	Codes []string `json:"codes,omitempty"`

	// GRPCService is what grpc.health.v1.Health is asked about.
	GRPCService string `json:"grpcService,omitempty"`

	// Send and Expect are what a UDP probe sends, and how its answer begins.
	Send   []byte `json:"send,omitempty"`
	Expect []byte `json:"expect,omitempty"`

	// Interval between two probes of a backend (100ms to 1h, by default 5s), and
	// how long one may take (10ms to the interval, by default 1s).
	Interval metav1.Duration `json:"interval,omitempty"`
	Timeout  metav1.Duration `json:"timeout,omitempty"`

	// Rise and Fall are how many probes in a row must succeed (by default 2), or
	// fail (by default 3), to change a verdict: 1 to 100.
	Rise int32 `json:"rise,omitempty"`
	Fall int32 `json:"fall,omitempty"`

	// Probers is how many LB nodes probe each backend, and tell the others: 1 to
	// 64. By default, or 0, each LB node probes for itself. It needs the agents'
	// certificates (peers).
	Probers int32 `json:"probers,omitempty"`

	// OnFailure says what becomes of the TCP connections of a backend whose check
	// fails: Keep (the default), since checks can be wrong, or Reset. New flows
	// and UDP go elsewhere in either case.
	OnFailure OnFailure `json:"onFailure,omitempty"`
}

// HealthCheckKind is how a backend is asked.
type HealthCheckKind string

// The kinds of health checks.
const (
	HealthCheckTCP   HealthCheckKind = "TCP"
	HealthCheckHTTP  HealthCheckKind = "HTTP"
	HealthCheckHTTPS HealthCheckKind = "HTTPS"
	HealthCheckGRPC  HealthCheckKind = "GRPC"
	HealthCheckUDP   HealthCheckKind = "UDP"
)

// OnFailure says what becomes of connections.
type OnFailure string

// What may become of connections.
const (
	OnFailureKeep  OnFailure = "Keep"
	OnFailureReset OnFailure = "Reset"
)

// Limits bound what clients may send to each port of a Service: of each LB node
// that they come to. 0 is no limit.
type Limits struct {
	RateLimit `json:",inline"`

	// PerClient bounds what each IPv4 address, or IPv6 /64, may send.
	PerClient RateLimit `json:"perClient,omitempty"`
}

// RateLimit bounds what is sent in a second. It may be exceeded for 100 ms.
type RateLimit struct {
	// ConnectionsPerSecond counts TCP SYNs: 1 to 100000000.
	ConnectionsPerSecond int64 `json:"connectionsPerSecond,omitempty"`
	// PacketsPerSecond is 1 to 1000000000.
	PacketsPerSecond int64 `json:"packetsPerSecond,omitempty"`
	// BitsPerSecond counts IP packets, headers included: 64000 to 1000000000000.
	BitsPerSecond int64 `json:"bitsPerSecond,omitempty"`
}

// SYNCookies are made by the agent on the backend's node, so they need modes
// Geneve or IPIP, and net.ipv4.tcp_syncookies=2 where the server's socket is.
type SYNCookies struct {
	// Threshold is how many new SYNs a second a backend's port may get before
	// they are answered with cookies: 1 to 100000000, or 0 (the default) for
	// never.
	Threshold int64 `json:"threshold,omitempty"`
}

// Weight is for endpoints of an address, or of EndpointSlices with labels.
type Weight struct {
	// Address of one backend.
	Address string `json:"address,omitempty"`
	// SliceLabels that an EndpointSlice must have.
	SliceLabels map[string]string `json:"sliceLabels,omitempty"`
	// Weight is 0 to 1000. A backend of weight 0 takes no new flows, and keeps
	// those that it has.
	Weight int32 `json:"weight"`
}

// Drain says how backends that are leaving are treated.
type Drain struct {
	// Timeout ends the connections that a backend still has so long after it
	// began to leave. By default, or 0, they last until the endpoint goes.
	Timeout metav1.Duration `json:"timeout,omitempty"`
}

// TargetRef names a Service in the policy's namespace.
type TargetRef struct {
	Name string `json:"name"`
}

// Mode is how packets reach the backends.
type Mode string

// The modes that a ServicePolicy may choose.
const (
	ModeGeneve Mode = "Geneve"
	ModeIPIP   Mode = "IPIP"
	ModeL2     Mode = "L2"
	ModeNAT    Mode = "NAT"
)

// Datagrams says what belongs together in UDP.
type Datagrams string

// The kinds of datagrams.
const (
	DatagramsStream      Datagrams = "Stream"
	DatagramsIndependent Datagrams = "Independent"
)

// ServicePolicyList is a list of ServicePolicies.
type ServicePolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []ServicePolicy `json:"items"`
}
