// SPDX-License-Identifier: Apache-2.0

package plan_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/plan"
)

var update = flag.Bool("update", false, "rewrite golden files")

// The example has no findings, and these plans.
func TestExampleGolden(t *testing.T) {
	t.Run("small", func(t *testing.T) { expectPlans(t, "../../examples/small.yaml", "testdata/small.plan") })
	t.Run("every mode and option", func(t *testing.T) { expectPlans(t, "../../examples", "testdata/services.plan") })
}

func expectPlans(t *testing.T, source, path string) {
	t.Helper()
	s, findings := file.Load([]string{source})
	if len(findings) > 0 {
		t.Fatalf("findings: %v", findings)
	}
	var text strings.Builder
	for _, node := range s.Nodes {
		p, findings := plan.ForNode(s, node.Name)
		if len(findings) > 0 {
			t.Errorf("%s: %v", node.Name, findings)
		}
		text.WriteString(plan.Format(p))
	}
	if *update {
		if err := os.WriteFile(path, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != text.String() {
		t.Errorf("plans (%v):\n%s\nwant\n%s", err, text.String(), want)
	}
}

var (
	vip     = netip.MustParseAddr("192.0.2.1")
	workers = []lb.Node{
		{Name: "lb", LoadBalancer: true, TunnelAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		{Name: "w", Backend: true, TunnelAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Pods: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}},
	}
)

func service(endpoints ...lb.Endpoint) lb.Snapshot {
	return lb.Snapshot{Nodes: workers, Services: []lb.Service{{
		ID: lb.ServiceID{Namespace: "d", Name: "s"}, VIPs: []netip.Addr{vip}, Ports: []lb.ServicePort{{Port: 80, Protocol: lb.TCP}},
		Policy: lb.Policy{Mode: lb.ModeGeneve}, Endpoints: endpoints}}}
}

func endpoint(last byte, ready, serving, terminating bool) lb.Endpoint {
	return lb.Endpoint{Address: netip.AddrFrom4([4]byte{10, 244, 0, last}), Ports: map[lb.PortKey]uint16{{Protocol: lb.TCP}: 8080},
		Ready: ready, Serving: serving, Terminating: terminating, Weight: 1}
}

// states is "address: state" of what a plan has.
func states(t *testing.T, s lb.Snapshot) map[byte]string {
	t.Helper()
	p, findings := plan.ForNode(s, "lb")
	if len(findings) > 0 {
		t.Errorf("findings: %v", findings)
	}
	found := map[byte]string{}
	for _, b := range p.Frontends[0].Backends {
		found[b.ID.Target.Addr().As4()[3]] = b.State.String()
	}
	return found
}

// What becomes of an endpoint under each of its conditions (KEP-1669), row by row:
// alone, and beside one that is ready.
func TestConditions(t *testing.T) {
	for _, c := range []struct {
		ready, serving, terminating bool
		alone, beside               string
	}{
		{true, true, false, "active", "active"},
		{true, false, false, "active", "active"},
		{false, false, false, "failing", "failing"},
		{false, true, false, "failing", "failing"},
		{false, true, true, "active", "draining"},
		{false, false, true, "failing", "failing"},
		{true, true, true, "active", "active"}, // publishNotReadyAddresses
	} {
		e := endpoint(1, c.ready, c.serving, c.terminating)
		if got := states(t, service(e))[1]; got != c.alone {
			t.Errorf("%+v alone: %q", c, got)
		}
		if got := states(t, service(e, endpoint(2, true, true, false)))[1]; got != c.beside {
			t.Errorf("%+v beside a ready one: %q", c, got)
		}
	}
}

// An endpoint that stands in two slices counts once, and the readiest counts.
func TestEndpointInTwoSlices(t *testing.T) {
	for _, s := range []lb.Snapshot{
		service(endpoint(1, true, true, false), endpoint(1, false, true, true)),
		service(endpoint(1, false, true, true), endpoint(1, true, true, false)),
		service(endpoint(1, true, true, false), endpoint(1, true, true, false)),
	} {
		if got := states(t, s); len(got) != 1 || got[1] != "active" {
			t.Errorf("states: %v", got)
		}
	}
}

func TestFindings(t *testing.T) {
	if _, findings := plan.ForNode(service(), "who"); len(findings) != 1 || findings[0].Code != plan.UnknownNode.Code {
		t.Errorf("unknown node: %v", findings)
	}
	far := endpoint(1, true, true, false)
	far.NodeName = "elsewhere"
	p, findings := plan.ForNode(service(far), "lb")
	if len(findings) != 1 || findings[0].Code != plan.Unreachable.Code || len(p.Frontends[0].Backends) != 0 {
		t.Errorf("unreachable endpoint: %v, %+v", findings, p.Frontends)
	}
	s := service(endpoint(1, true, true, false))
	s.Services[0].Ports = nil
	for i := range 9 {
		s.Services[0].Ports = append(s.Services[0].Ports, lb.ServicePort{Port: uint16(80 + i), Protocol: lb.TCP})
	}
	p, findings = plan.ForNode(s, "w")
	if len(findings) != 1 || findings[0].Code != plan.TooManyServed.Code || len(p.Pods[0].Serves) != 8 {
		t.Errorf("9 ports: %v, %+v", findings, p.Pods)
	}
}

// The size of a derived table follows the policy.
func TestTableSize(t *testing.T) {
	for _, c := range []struct{ fixed, per, want uint32 }{{0, 0, 1024}, {0, 10, 256}, {0, 1000, 4096}, {512, 0, 512}} {
		s := service(endpoint(1, true, true, false), endpoint(2, true, true, false), endpoint(3, true, true, false))
		s.Services[0].Policy.TableSize, s.Services[0].Policy.SlotsPerBackend = c.fixed, c.per
		p, _ := plan.ForNode(s, "lb")
		if got := p.Frontends[0].TableSize; got != c.want {
			t.Errorf("%+v: %d slots", c, got)
		}
	}
}

// Of more VIPs and ports than a Pod's port can serve, LB nodes and the worker
// leave out the same.
func TestTooManyServed(t *testing.T) {
	s := lb.Snapshot{Nodes: workers}
	for i := range 11 {
		one := service(endpoint(1, true, true, false)).Services[0]
		one.ID.Name, one.VIPs = string(rune('a'+i)), []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, byte(20 - i)})}
		s.Services = append(s.Services, one)
	}
	balances, findings := plan.ForNode(s, "lb")
	delivers, more := plan.ForNode(s, "w")
	for _, of := range [][]lb.Finding{findings, more} {
		if len(of) != 1 || of[0].Code != "FL0403" || !strings.Contains(of[0].Problem, "serves 11") {
			t.Errorf("findings: %v", of)
		}
	}
	if len(delivers.Pods) != 1 || len(delivers.Pods[0].Serves) != 8 {
		t.Fatalf("Pods: %+v", delivers.Pods)
	}
	for _, f := range balances.Frontends {
		served := false
		for _, front := range delivers.Pods[0].Serves {
			served = served || front.Addr() == f.ID.VIP
		}
		if served != (len(f.Backends) == 1) {
			t.Errorf("%s: served %v, %d backends", f.ID, served, len(f.Backends))
		}
	}
}

// What must not be a backend is none, whoever says that it is.
func TestUnsafeBackends(t *testing.T) {
	for _, address := range []string{"127.0.0.1", "169.254.169.254", "224.0.0.1", "192.0.2.1"} {
		bad := endpoint(1, true, true, false)
		bad.Address = netip.MustParseAddr(address)
		for _, node := range []string{"lb", "w"} {
			s := service(bad, endpoint(2, true, true, false))
			s.Nodes = []lb.Node{workers[0], workers[1]}
			s.Nodes[1].Pods = append(s.Nodes[1].Pods, netip.MustParsePrefix("0.0.0.0/0"))
			p, findings := plan.ForNode(s, node)
			if node == "lb" && (len(findings) != 1 || len(p.Frontends[0].Backends) != 1) {
				t.Errorf("%s: %v, %+v", address, findings, p.Frontends[0].Backends)
			}
			if node == "w" && len(p.Pods) != 1 {
				t.Errorf("%s: %+v", address, p.Pods)
			}
		}
	}
}

// Each backend is probed by as many LB nodes as asked for, about as many by
// each; a node that is added takes only its share from the others.
func TestProbersShare(t *testing.T) {
	s := lb.Snapshot{}
	for i := range 4 {
		s.Nodes = append(s.Nodes, lb.Node{Name: fmt.Sprintf("lb-%d", i), LoadBalancer: true, TunnelAddresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})}})
	}
	s.Nodes = append(s.Nodes, workers[1])
	service := lb.Service{ID: lb.ServiceID{Namespace: "d", Name: "s"}, VIPs: []netip.Addr{vip}, Ports: []lb.ServicePort{{Port: 80, Protocol: lb.TCP}},
		Policy: lb.Policy{Mode: lb.ModeGeneve, Check: lb.Check{Kind: lb.CheckTCP, Probers: 2}}}
	const backends = 200
	for i := range backends {
		service.Endpoints = append(service.Endpoints, endpoint(byte(i+1), true, true, false))
	}
	s.Services = []lb.Service{service}
	probers := func(s lb.Snapshot, nodes int) (here map[lb.ProbeID][]string, by map[string]int) {
		here, by = map[lb.ProbeID][]string{}, map[string]int{}
		for i := range nodes {
			name := fmt.Sprintf("lb-%d", i)
			p, findings := plan.ForNode(s, name)
			if len(findings) > 0 {
				t.Fatal(findings)
			}
			for _, probe := range p.Probes {
				if !probe.Elsewhere {
					here[probe.ID] = append(here[probe.ID], name)
					by[name]++
				}
			}
		}
		return here, by
	}
	before, by := probers(s, 4)
	for id, nodes := range before {
		if len(nodes) != 2 {
			t.Errorf("%s is probed by %v", id, nodes)
		}
	}
	for name, n := range by {
		if n < backends/2*6/10 || n > backends/2*14/10 {
			t.Errorf("%s probes %d of %d", name, n, backends)
		}
	}
	s.Nodes = append(s.Nodes, lb.Node{Name: "lb-4", LoadBalancer: true, TunnelAddresses: []netip.Addr{netip.MustParseAddr("10.0.0.9")}})
	after, _ := probers(s, 5)
	for id, nodes := range after {
		for _, name := range nodes {
			if name != "lb-4" && !slices.Contains(before[id], name) {
				t.Errorf("%s moved to %s, which is not the new one", id, name)
			}
		}
	}
}
