// SPDX-License-Identifier: Apache-2.0

// Package v1alpha1 holds Fairlead's own objects, API group fairlead.dev: Node,
// AddressPool and ServicePolicy. What they mean is checked where they become a
// snapshot, in package file.
package v1alpha1

const (
	// Group is the API group of Fairlead's objects.
	Group = "fairlead.dev"
	// APIVersion is what Fairlead's objects have as their apiVersion.
	APIVersion = Group + "/v1alpha1"

	// AddressesAnnotation lists a Service's VIPs, separated by commas, where
	// nothing writes its status.loadBalancer.ingress.
	AddressesAnnotation = Group + "/addresses"
	// LoadBalancerClass is the spec.loadBalancerClass that means Fairlead. A
	// Service without a class is Fairlead's too.
	LoadBalancerClass = Group + "/lb"
)
