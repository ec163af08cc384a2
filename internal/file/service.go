// SPDX-License-Identifier: Apache-2.0

package file

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"fairlead.dev/fairlead/api/v1alpha1"
	"fairlead.dev/fairlead/internal/lb"
)

// ours: of type LoadBalancer, and of no other implementation's class.
func ours(v *corev1.Service) bool {
	class := v.Spec.LoadBalancerClass
	return v.Spec.Type == corev1.ServiceTypeLoadBalancer && (class == nil || *class == v1alpha1.LoadBalancerClass)
}

func (b *builder) addService(o *object, v *corev1.Service) {
	if !ours(v) {
		return
	}
	s := &service{object: o}
	s.ID = lb.ServiceID{Namespace: cmp.Or(v.Namespace, "default"), Name: v.Name}
	s.Policy = lb.Policy{Mode: lb.ModeGeneve}
	s.PublishNotReady = v.Spec.PublishNotReadyAddresses
	s.SourceRanges, s.Affinity = sourceRanges(o, v), affinity(o, v)
	s.VIPs = vips(o, v)
	if len(s.VIPs) == 0 {
		o.find(noVIP, "status.loadBalancer.ingress", "nothing is balanced for it")
	}
	if len(v.Spec.Ports) == 0 {
		o.find(noPorts, "spec.ports", "empty")
	}
	names, numbers := map[string]bool{}, map[lb.PortKey]bool{}
	for i, port := range v.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		proto, ok := protocol(o, &port.Protocol, field+".protocol")
		if !ok || !validPort(o, port.Port, field+".port") {
			continue
		}
		if names[port.Name] {
			o.find(portNames, field+".name", "%q stands twice", port.Name)
		}
		names[port.Name] = true
		number := lb.PortKey{Name: fmt.Sprint(port.Port), Protocol: proto}
		if numbers[number] {
			o.find(duplicatePort, field+".port", "%d/%s stands twice in this Service", port.Port, proto)
		}
		numbers[number] = true
		s.Ports = append(s.Ports, lb.ServicePort{Name: port.Name, Port: uint16(port.Port), Protocol: proto})
	}
	b.services[s.ID] = s
	b.order = append(b.order, s)
}

// vips are the addresses of status.loadBalancer.ingress that are not a proxy's
// or, where there is none, those of the annotation.
func vips(o *object, v *corev1.Service) []netip.Addr {
	var found []netip.Addr
	for i, ingress := range v.Status.LoadBalancer.Ingress {
		if ingress.IP == "" || ingress.IPMode != nil && *ingress.IPMode != corev1.LoadBalancerIPModeVIP {
			continue
		}
		if addr, ok := o.address(ingress.IP, fmt.Sprintf("status.loadBalancer.ingress[%d].ip", i), badAddress); ok {
			found = append(found, addr)
		}
	}
	if annotation := v.Annotations[v1alpha1.AddressesAnnotation]; len(v.Status.LoadBalancer.Ingress) == 0 && annotation != "" {
		for text := range strings.SplitSeq(annotation, ",") {
			if addr, ok := o.address(strings.TrimSpace(text), "metadata.annotations."+v1alpha1.AddressesAnnotation, badAddress); ok {
				found = append(found, addr)
			}
		}
	}
	slices.SortFunc(found, netip.Addr.Compare)
	return slices.Compact(found)
}

// sourceRanges are the clients that may come. Kubernetes allows white space
// around them, and bits behind their length.
func sourceRanges(o *object, v *corev1.Service) []netip.Prefix {
	var found []netip.Prefix
	for i, text := range v.Spec.LoadBalancerSourceRanges {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p.Addr().Is4In6() {
			o.find(badPrefix, fmt.Sprintf("spec.loadBalancerSourceRanges[%d]", i), "%q is not a prefix", text)
			continue
		}
		found = append(found, p.Masked())
	}
	if len(found) > sourceRangesMost {
		o.find(badPrefix, "spec.loadBalancerSourceRanges", "%d are more than %d", len(found), sourceRangesMost)
		return nil
	}
	slices.SortFunc(found, netip.Prefix.Compare)
	return slices.Compact(found)
}

// checkRanges tells of VIPs that are open to all though the Service has ranges.
func (s *service) checkRanges() {
	for _, vip := range s.VIPs {
		ofFamily := func(p netip.Prefix) bool { return p.Addr().Is4() == vip.Is4() }
		if len(s.SourceRanges) > 0 && !slices.ContainsFunc(s.SourceRanges, ofFamily) {
			s.object.find(rangesOpen, "spec.loadBalancerSourceRanges", "%s has none of its family", vip)
		}
	}
}

// Of one Service.
const sourceRangesMost = 10000

func affinity(o *object, v *corev1.Service) time.Duration {
	const defaultSeconds, mostSeconds = 10800, 86400 // as Kubernetes has them
	switch v.Spec.SessionAffinity {
	case "", corev1.ServiceAffinityNone:
		return 0
	case corev1.ServiceAffinityClientIP:
	default:
		o.find(badAffinity, "spec.sessionAffinity", "%q is neither None nor ClientIP", v.Spec.SessionAffinity)
		return 0
	}
	seconds := int32(defaultSeconds)
	if c := v.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
		seconds = *c.ClientIP.TimeoutSeconds
	}
	if seconds < 1 || seconds > mostSeconds {
		o.find(badAffinity, "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "%d is not between 1 and %d", seconds, mostSeconds)
		return 0
	}
	return time.Duration(seconds) * time.Second
}

func protocol(o *object, p *corev1.Protocol, field string) (lb.Protocol, bool) {
	if p == nil {
		return lb.TCP, true
	}
	switch *p {
	case "", corev1.ProtocolTCP:
		return lb.TCP, true
	case corev1.ProtocolUDP:
		return lb.UDP, true
	}
	o.find(badProtocol, field, "%q", *p)
	return 0, false
}

func validPort(o *object, port int32, field string) bool {
	if port < 1 || port > 65535 {
		o.find(badPort, field, "%d", port)
		return false
	}
	return true
}

func (b *builder) addSlice(o *object, v *discoveryv1.EndpointSlice) {
	id := lb.ServiceID{Namespace: cmp.Or(v.Namespace, "default"), Name: v.Labels[discoveryv1.LabelServiceName]}
	s := b.services[id]
	if s == nil {
		o.find(noSuchService, "metadata.labels", "there is no Service %s of type LoadBalancer", id)
		return
	}
	s.slices = true
	if v.AddressType != discoveryv1.AddressTypeIPv4 && v.AddressType != discoveryv1.AddressTypeIPv6 {
		o.find(wrongFamily, "addressType", "%q is neither IPv4 nor IPv6", v.AddressType)
		return
	}
	ports := map[lb.PortKey]uint16{}
	for i, port := range v.Ports {
		field := fmt.Sprintf("ports[%d]", i)
		proto, ok := protocol(o, port.Protocol, field+".protocol")
		if !ok || port.Port == nil || !validPort(o, *port.Port, field+".port") {
			continue
		}
		key := lb.PortKey{Protocol: proto}
		if port.Name != nil {
			key.Name = *port.Name
		}
		ports[key] = uint16(*port.Port)
	}
	for i, e := range v.Endpoints {
		if endpoint, ok := endpointOf(o, v.AddressType, e, fmt.Sprintf("endpoints[%d]", i)); ok {
			endpoint.Ports = ports
			endpoint.Weight = weightOf(s.weights, endpoint.Address, v.Labels)
			s.Endpoints = append(s.Endpoints, endpoint)
		}
	}
}

// endpointOf reads one endpoint; like kube-proxy, it takes the first address.
func endpointOf(o *object, family discoveryv1.AddressType, e discoveryv1.Endpoint, field string) (lb.Endpoint, bool) {
	if len(e.Addresses) == 0 {
		o.find(badAddress, field+".addresses", "empty")
		return lb.Endpoint{}, false
	}
	at := field + ".addresses[0]"
	addr, ok := o.address(e.Addresses[0], at, unsafe)
	if !ok {
		return lb.Endpoint{}, false
	}
	if addr.Is4() != (family == discoveryv1.AddressTypeIPv4) {
		o.find(wrongFamily, at, "%s in a slice of addressType %s", addr, family)
		return lb.Endpoint{}, false
	}
	yes := func(p *bool) bool { return p == nil || *p }
	found := lb.Endpoint{Address: addr, Weight: 1, Ready: yes(e.Conditions.Ready), Serving: yes(e.Conditions.Serving),
		Terminating: e.Conditions.Terminating != nil && *e.Conditions.Terminating}
	if e.NodeName != nil {
		found.NodeName = *e.NodeName
	}
	if e.TargetRef != nil {
		found.UID = string(e.TargetRef.UID)
	}
	return found, true
}

// checkEndpoints leaves out those that must not be backends, and says where a
// port has none.
func (s *service) checkEndpoints(forbidden map[netip.Addr]string) {
	s.Endpoints = slices.DeleteFunc(s.Endpoints, func(e lb.Endpoint) bool {
		why := forbidden[e.Address]
		if why != "" {
			s.object.find(unsafe, "endpoints", "%s %s", e.Address, why)
		}
		return why != ""
	})
	slices.SortStableFunc(s.Endpoints, func(a, b lb.Endpoint) int { return a.Address.Compare(b.Address) })
	for i, port := range s.Ports {
		key, found := lb.PortKey{Name: port.Name, Protocol: port.Protocol}, false
		for _, e := range s.Endpoints {
			number, ok := e.Ports[key]
			found = found || ok
			if ok && s.Policy.Mode.Held() && number != port.Port {
				s.object.find(portsDiffer, fmt.Sprintf("spec.ports[%d].port", i), "%d at %s, %d at the Service", number, e.Address, port.Port)
			}
		}
		if !found && len(s.Endpoints) > 0 {
			s.object.find(noEndpoints, fmt.Sprintf("spec.ports[%d].name", i), "%q/%s", port.Name, port.Protocol)
		}
	}
}
