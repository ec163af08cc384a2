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
	// agent on the backend's node; with IPIP the server holds the VIP itself.
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
