// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// Node is one machine that forwards or receives. It is cluster-wide, and named
// as the agent there is (--node), which with Kubernetes is the v1 Node's name.
type Node struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec NodeSpec `json:"spec"`
}

// NodeSpec describes a Node.
type NodeSpec struct {
	// Roles of the node: LoadBalancer, Backend, or both.
	Roles []Role `json:"roles"`

	// TunnelAddresses are where tunnel packets to this node go and, on a load
	// balancer, come from: one IPv4 address, one IPv6 address, or both. They
	// are the node's own, never those of another node and never VIPs.
	TunnelAddresses []string `json:"tunnelAddresses"`

	// IPIPSourcePrefixes are prefixes that the outer source of a load
	// balancer's IPIP packets varies in, so that receivers spread flows over
	// their queues: at most one of each family, routed to nobody else. Without
	// one the source is the tunnel address.
	IPIPSourcePrefixes []string `json:"ipipSourcePrefixes,omitempty"`

	// NATAddresses are what this LB node's packets to backends of mode NAT come
	// from, up to 8 of each family; by default its tunnel addresses. Each gives a
	// flow to each backend for every port of the agent's nat.ports.
	NATAddresses []string `json:"natAddresses,omitempty"`

	// PodAddresses and PodSubnets are the addresses of the Pods on this node.
	// They tell which node an endpoint without nodeName is on.
	PodAddresses []string `json:"podAddresses,omitempty"`
	PodSubnets   []string `json:"podSubnets,omitempty"`
}

// Role is what a node does.
type Role string

// The roles of a node.
const (
	RoleLoadBalancer Role = "LoadBalancer"
	RoleBackend      Role = "Backend"
)

// NodeList is a list of Nodes.
type NodeList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Node `json:"items"`
}
