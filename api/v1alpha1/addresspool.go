// SPDX-License-Identifier: Apache-2.0

package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// AddressPool is a set of addresses that VIPs may be taken from. It is
// cluster-wide. Pools do not overlap.
type AddressPool struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec AddressPoolSpec `json:"spec"`
}

// AddressPoolSpec describes an AddressPool.
type AddressPoolSpec struct {
	// Addresses are prefixes (192.0.2.0/24), ranges with both ends included
	// (2001:db8::1-2001:db8::ff), or single addresses.
	Addresses []string `json:"addresses"`
}

// AddressPoolList is a list of AddressPools.
type AddressPoolList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AddressPool `json:"items"`
}
