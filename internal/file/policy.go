// SPDX-License-Identifier: Apache-2.0

package file

import (
	"cmp"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"fairlead.dev/fairlead/api/v1alpha1"
	"fairlead.dev/fairlead/internal/lb"
)

const largestTable = 131072

var modes = map[v1alpha1.Mode]lb.Mode{"": lb.ModeGeneve, v1alpha1.ModeGeneve: lb.ModeGeneve, v1alpha1.ModeIPIP: lb.ModeIPIP, v1alpha1.ModeL2: lb.ModeL2, v1alpha1.ModeNAT: lb.ModeNAT}

func (b *builder) addPolicy(o *object, v *v1alpha1.ServicePolicy) {
	policy := lb.Policy{Name: v.Name, Mode: lb.ModeGeneve}
	if mode, ok := modes[v.Spec.Mode]; ok {
		policy.Mode = mode
	} else {
		o.find(badPolicy, "spec.mode", "%q is none of Geneve, IPIP, L2 and NAT", v.Spec.Mode)
	}
	switch v.Spec.Datagrams {
	case "", v1alpha1.DatagramsStream:
	case v1alpha1.DatagramsIndependent:
		policy.Independent = true
	default:
		o.find(badPolicy, "spec.datagrams", "%q is neither Stream nor Independent", v.Spec.Datagrams)
	}
	policy.TableSize, policy.SlotsPerBackend = tableSize(o, v)
	if policy.DrainTimeout = v.Spec.Drain.Timeout.Duration; policy.DrainTimeout < 0 {
		o.find(badPolicy, "spec.drain.timeout", "%s is negative", policy.DrainTimeout)
		policy.DrainTimeout = 0
	}
	if v.Spec.HealthCheck != nil {
		policy.Check = checkOf(o, v.Spec.HealthCheck)
	}
	if l := v.Spec.Limits; l != nil {
		policy.Limits = lb.Limits{All: rateOf(o, l.RateLimit, "spec.limits"), PerClient: rateOf(o, l.PerClient, "spec.limits.perClient")}
	}
	if n := v.Spec.SYNCookies.Threshold; n < 0 || n > 1e8 {
		o.find(badPolicy, "spec.synCookies.threshold", "%d is not between 1 and 100000000", n)
	} else if policy.CookiesFrom = uint32(n); n > 0 && policy.Mode != lb.ModeGeneve && policy.Mode != lb.ModeIPIP {
		o.find(badPolicy, "spec.synCookies.threshold", "mode %s has no agent on the backend's node that could send cookies; use limits instead", policy.Mode)
	}
	weights := weightsOf(o, v.Spec.Weights)
	if len(v.Spec.TargetRefs) == 0 {
		o.find(badPolicy, "spec.targetRefs", "empty: it names no Service")
	}
	for i, ref := range v.Spec.TargetRefs {
		field := fmt.Sprintf("spec.targetRefs[%d].name", i)
		id := lb.ServiceID{Namespace: cmp.Or(v.Namespace, "default"), Name: ref.Name}
		s := b.services[id]
		switch {
		case s == nil:
			o.find(noSuchService, field, "there is no Service %s of type LoadBalancer", id)
		case s.policied != nil:
			o.find(badPolicy, field, "Service %s has %s already", id, s.policied.name)
		default:
			s.Policy, s.policied, s.weights = policy, o, weights
		}
	}
}

func tableSize(o *object, v *v1alpha1.ServicePolicy) (size, perBackend uint32) {
	if n := v.Spec.TableSize; n != 0 && (n < 256 || n > largestTable || n&(n-1) != 0) {
		o.find(badPolicy, "spec.tableSize", "%d is no power of two from 256 to %d", n, largestTable)
	} else {
		size = uint32(n)
	}
	switch per := v.Spec.SlotsPerBackend; {
	case per != 0 && (per < 10 || per > 1000):
		o.find(badPolicy, "spec.slotsPerBackend", "%d is not between 10 and 1000", per)
	case per != 0 && size != 0:
		o.find(badPolicy, "spec.slotsPerBackend", "tableSize fixes the size already; set one of both")
	default:
		perBackend = uint32(per)
	}
	return size, perBackend
}

// checkOf reads a health check, and fills in the defaults.
func checkOf(o *object, v *v1alpha1.HealthCheck) lb.Check {
	const at = "spec.healthCheck."
	c := lb.Check{Kind: lb.CheckKind(v.Kind), Path: v.Path, Host: v.Host, GRPCService: v.GRPCService, Send: v.Send, Expect: v.Expect,
		Interval: 5 * time.Second, Timeout: time.Second, Rise: 2, Fall: 3, Reset: v.OnFailure == v1alpha1.OnFailureReset}
	http := c.Kind == lb.CheckHTTP || c.Kind == lb.CheckHTTPS
	switch c.Kind {
	case lb.CheckTCP, lb.CheckHTTP, lb.CheckHTTPS, lb.CheckGRPC, lb.CheckUDP:
	default:
		o.find(badPolicy, at+"kind", "%q is none of TCP, HTTP, HTTPS, GRPC and UDP", v.Kind)
	}
	if v.Port != 0 && validPort(o, v.Port, at+"port") {
		c.Port = uint16(v.Port)
	}
	for _, only := range []struct {
		field     string
		set, fits bool
		kinds     string
	}{
		{"path", v.Path != "", http, "HTTP and HTTPS"}, {"host", v.Host != "", http, "HTTP and HTTPS"}, {"codes", len(v.Codes) > 0, http, "HTTP and HTTPS"},
		{"grpcService", v.GRPCService != "", c.Kind == lb.CheckGRPC, "GRPC"},
		{"send", len(v.Send) > 0, c.Kind == lb.CheckUDP, "UDP"}, {"expect", len(v.Expect) > 0, c.Kind == lb.CheckUDP, "UDP"},
	} {
		if only.set && !only.fits {
			o.find(badPolicy, at+only.field, "is for %s alone", only.kinds)
		}
	}
	if http && c.Path == "" {
		c.Path = "/"
	}
	if http && (!strings.HasPrefix(c.Path, "/") || strings.ContainsAny(c.Path, " \r\n\t")) {
		o.find(badPolicy, at+"path", "%q does not begin with / or has white space", c.Path)
	}
	if strings.ContainsAny(c.Host, " /\r\n\t") {
		o.find(badPolicy, at+"host", "%q is no host name", c.Host)
	}
	for i, text := range v.Codes {
		if r, ok := codeRange(text); ok {
			c.Codes = append(c.Codes, r)
		} else {
			o.find(badPolicy, fmt.Sprintf(at+"codes[%d]", i), "%q is neither a code nor a range such as 200-299", text)
		}
	}
	if len(v.Send) > 1024 || len(v.Expect) > 1024 {
		o.find(badPolicy, at+"send", "send and expect are 1024 bytes at most")
	}
	c.Interval = within(o, at+"interval", v.Interval, c.Interval, 100*time.Millisecond, time.Hour)
	c.Timeout = within(o, at+"timeout", v.Timeout, min(c.Timeout, c.Interval), 10*time.Millisecond, c.Interval)
	c.Rise, c.Fall = threshold(o, at+"rise", v.Rise, c.Rise), threshold(o, at+"fall", v.Fall, c.Fall)
	if c.Probers = int(v.Probers); c.Probers < 0 || c.Probers > 64 {
		o.find(badPolicy, at+"probers", "%d is not between 1 and 64", c.Probers)
		c.Probers = 0
	}
	switch v.OnFailure {
	case "", v1alpha1.OnFailureKeep, v1alpha1.OnFailureReset:
	default:
		o.find(badPolicy, at+"onFailure", "%q is neither Keep nor Reset", v.OnFailure)
	}
	return c
}

func within(o *object, field string, v metav1.Duration, fallback, least, most time.Duration) time.Duration {
	switch d := v.Duration; {
	case d == 0:
		return fallback
	case d < least || d > most:
		o.find(badPolicy, field, "%s is not between %s and %s", d, least, most)
		return fallback
	default:
		return d
	}
}

func threshold(o *object, field string, n int32, fallback int) int {
	if n < 0 || n > 100 {
		o.find(badPolicy, field, "%d is not between 1 and 100", n)
		return fallback
	}
	return cmp.Or(int(n), fallback)
}

func codeRange(text string) (lb.CodeRange, bool) {
	from, to, isRange := strings.Cut(text, "-")
	if !isRange {
		to = from
	}
	a, errA := strconv.Atoi(from)
	b, errB := strconv.Atoi(to)
	return lb.CodeRange{From: a, To: b}, errA == nil && errB == nil && a >= 100 && a <= b && b <= 599
}

func rateOf(o *object, v v1alpha1.RateLimit, at string) lb.Rate {
	rate := lb.Rate{}
	for _, one := range []struct {
		field       string
		value       int64
		least, most int64
		to          *uint64
	}{
		{"connectionsPerSecond", v.ConnectionsPerSecond, 1, 1e8, &rate.Connections},
		{"packetsPerSecond", v.PacketsPerSecond, 1, 1e9, &rate.Packets},
		{"bitsPerSecond", v.BitsPerSecond, 64e3, 1e12, &rate.Bits},
	} {
		if one.value != 0 && (one.value < one.least || one.value > one.most) {
			o.find(badPolicy, at+"."+one.field, "%d is not between %d and %d", one.value, one.least, one.most)
			continue
		}
		*one.to = uint64(one.value)
	}
	return rate
}

// weight is for the endpoints of an address, or of slices with labels.
type weight struct {
	address netip.Addr
	labels  map[string]string
	weight  uint32
}

func weightsOf(o *object, all []v1alpha1.Weight) []weight {
	var weights []weight
	for i, v := range all {
		at := fmt.Sprintf("spec.weights[%d]", i)
		w := weight{labels: v.SliceLabels, weight: uint32(v.Weight)}
		if v.Weight < 0 || v.Weight > 1000 {
			o.find(badPolicy, at+".weight", "%d is not between 0 and 1000", v.Weight)
			continue
		}
		if v.Address == "" == (len(v.SliceLabels) == 0) {
			o.find(badPolicy, at, "set one of address and sliceLabels")
			continue
		}
		if v.Address != "" {
			var ok bool
			if w.address, ok = o.address(v.Address, at+".address", badAddress); !ok {
				continue
			}
		}
		weights = append(weights, w)
	}
	return weights
}

// weightOf is that of the first that matches an endpoint, by default 1.
func weightOf(all []weight, address netip.Addr, labels map[string]string) uint32 {
	for _, w := range all {
		if w.address == address || !w.address.IsValid() && hasAll(labels, w.labels) {
			return w.weight
		}
	}
	return 1
}

func hasAll(labels, wanted map[string]string) bool {
	for key, value := range wanted {
		if have, ok := labels[key]; !ok || have != value {
			return false
		}
	}
	return true
}
