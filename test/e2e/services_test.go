// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

// lan makes a network of LB nodes and plain servers on one segment. The servers
// hold the VIPs, and do not answer for them by ARP.
func lan(t *testing.T, services ...func(*testnet.Network) testnet.Service) *testnet.Network {
	t.Helper()
	var nodes []testnet.NodeSpec
	for i := range 2 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("lb-%d", i+1), LoadBalancer: true, Agent: true})
	}
	for i := range 3 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("server-%d", i+1), Backend: true})
	}
	return networkOf(t, testnet.Config{Nodes: nodes, LAN: true}, func(n *testnet.Network) {
		for _, node := range n.Backends() {
			holdVIPs(t, node)
			serve(t, node.Namespace, 80, 53)
		}
	}, services...)
}

func heldWeb(n *testnet.Network) testnet.Service {
	return testnet.Service{Name: "web", VIPs: both, Port: 80, TargetPort: 80, Protocol: "TCP", Mode: "L2", Servers: n.Backends()}
}

// Servers on the same segment get the packets as they came, and answer past the
// LB nodes.
func TestL2(t *testing.T) {
	n := lan(t, heldWeb)
	requests(t, n, 300, 3)
	direct(t, n)
	sums := 0
	for _, vip := range both {
		c, err := dial(n.Client, "tcp", vip, 80)
		must(t, err)
		const size = 8 << 20
		must(t, c.SetDeadline(time.Now().Add(30*time.Second)))
		_, err = fmt.Fprintf(c, "put %d\n", size)
		must(t, err)
		if _, err := io.CopyN(c, stream(), size); err != nil {
			t.Fatal(err)
		}
		if line, err := readLine(c); err == nil && len(line) == 64 {
			sums++
		}
		c.Close()
	}
	if sums != 2 {
		t.Errorf("%d of 2 transfers arrived", sums)
	}
}

// Only clients in the ranges come in.
func TestSourceRanges(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, func(n *testnet.Network) testnet.Service {
		s := web(n)
		s.Spec = fmt.Sprintf("loadBalancerSourceRanges: [%q, %q]", testnet.Client4.String()+"/32", testnet.Client6.String()+"/128")
		return s
	})
	requests(t, n, 50, 8)
	for _, vip := range both {
		if c, err := dialWithin(n.Stranger, "tcp", vip, 80, 500*time.Millisecond); err == nil {
			c.Close()
			t.Errorf("%s: a stranger came in", vip)
		}
	}
	dropped := uint64(0)
	for _, node := range n.LoadBalancers() {
		dropped += drops(t, node, "source_range")
	}
	if dropped == 0 {
		t.Error("no drop was counted")
	}
	// Open to all, and closed to all but strangers, while it runs.
	s := web(n)
	must(t, n.WriteService(s))
	eventually(t, func() error { _, _, err := who(n.Stranger, vip4); return err })
	s.Spec = fmt.Sprintf("loadBalancerSourceRanges: [%q, %q]", testnet.Stranger4.String()+"/32", testnet.Stranger6.String()+"/128")
	must(t, n.WriteService(s))
	eventually(t, func() error {
		if c, err := dialWithin(n.Client, "tcp", vip4, 80, 200*time.Millisecond); err == nil {
			c.Close()
			return fmt.Errorf("the client still comes in")
		}
		return nil
	})
}

// eventually waits until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatal(err)
}

// New connections beyond the limit are refused, and counted; those within it
// are served.
func TestConnectionLimit(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, func(n *testnet.Network) testnet.Service {
		s := web(n)
		s.Policy = "limits: {perClient: {connectionsPerSecond: 20}}"
		return s
	})
	must(t, n.SpreadOver(n.LoadBalancers()[0]))
	served := 0
	for range 60 {
		if c, err := dialWithin(n.Client, "tcp", vip4, 80, 20*time.Millisecond); err == nil {
			c.Close()
			served++
		}
	}
	limited := drops(t, n.LoadBalancers()[0], "limit_client")
	t.Logf("%d of 60 connections served, %d SYNs dropped", served, limited)
	if served < 2 || limited == 0 || served > 59 {
		t.Errorf("%d served, %d dropped", served, limited)
	}
}

// A backend of weight 0 takes no new connections and keeps those that it has;
// others share by weight, also by the labels of their slices.
func TestWeights(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, web)
	heavy, none := n.AllPods()[0], n.AllPods()[1]
	var held []net.Conn
	for range 40 {
		c, err := dial(n.Client, "tcp", vip4, 80)
		must(t, err)
		defer c.Close()
		held = append(held, c)
	}
	s := web(n)
	s.Policy = fmt.Sprintf("weights: [{address: %q, weight: 3}, {address: %q, weight: 0}]", heavy.Address4, none.Address4)
	must(t, n.WriteService(s))
	eventually(t, func() error {
		d, err := n.LoadBalancers()[0].Status()
		if err != nil {
			return err
		}
		for _, service := range d.Services {
			for _, b := range service.Backends {
				if strings.HasPrefix(b.Address, none.Address4.String()+":") && b.Share == 0 {
					return nil
				}
			}
		}
		return fmt.Errorf("the weight is not there yet")
	})
	time.Sleep(100 * time.Millisecond)
	seen := map[string]int{}
	const count = 900
	for range count {
		server, _, err := who(n.Client, vip4)
		must(t, err)
		seen[server]++
	}
	t.Logf("%v", seen)
	part := float64(seen[heavy.Label]) / count
	if seen[none.Label] != 0 || part < 0.25 || part > 0.42 { // 3 of 9
		t.Errorf("weight 0 got %d, weight 3 of 9 got %.2f", seen[none.Label], part)
	}
	stillAnswer(t, held)
}

// All connections of a client go to one Pod, also while Pods come and go and
// by whichever LB node; when that one goes, they all go to another.
func TestAffinity(t *testing.T) {
	const half = 4
	n := network(t, testnet.DefaultNodes(), nil, func(n *testnet.Network) testnet.Service {
		s := web(n)
		s.Pods, s.Spec = n.AllPods()[:half], "sessionAffinity: ClientIP"
		return s
	})
	for _, vip := range both {
		first := ""
		all := func(times int) (servers map[string]int) {
			servers = map[string]int{}
			for range times {
				server, _, err := who(n.Client, vip)
				must(t, err)
				servers[server]++
			}
			return servers
		}
		for server := range all(1) {
			first = server
		}
		time.Sleep(1200 * time.Millisecond) // the answers are noted once a second at most
		s := web(n)
		s.Spec = "sessionAffinity: ClientIP"
		for i, pods := range [][]*testnet.Pod{n.AllPods(), n.AllPods()[:half+1], n.AllPods()} {
			s.Pods = pods
			must(t, n.WriteService(s))
			for range 20 {
				if got := all(10); len(got) != 1 || got[first] == 0 {
					t.Fatalf("%s, change %d: %v, and the client was at %s", vip, i, got, first)
				}
				time.Sleep(20 * time.Millisecond)
			}
		}
		s.Draining, s.Pods = nil, nil
		for _, pod := range n.AllPods() {
			if pod.Label == first {
				s.Draining = append(s.Draining, pod)
			} else {
				s.Pods = append(s.Pods, pod)
			}
		}
		must(t, n.WriteService(s))
		eventually(t, func() error {
			if got := all(10); got[first] > 0 || len(got) != 1 {
				return fmt.Errorf("%v, and %s is leaving", got, first)
			}
			return nil
		})
		s.Draining, s.Pods = nil, n.AllPods()[:half]
		must(t, n.WriteService(s))
		time.Sleep(500 * time.Millisecond)
	}
}

func hostPrefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// requests4 is requests by IPv4 alone.
func requests4(t *testing.T, n *testnet.Network, count, servers int) {
	t.Helper()
	seen := map[string]int{}
	for range count {
		server, _, err := who(n.Client, vip4)
		must(t, err)
		seen[server]++
	}
	if len(seen) != servers {
		t.Errorf("%d servers answered, want %d: %v", len(seen), servers, seen)
	}
}

// Backends that can do nothing: they see an LB node's address, and their
// answers come back through it. Connections outlive changes of the backends.
func TestNAT(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		nodes[i].Pods = 0
		if nodes[i].Backend {
			nodes[i].Agent, nodes[i].Backend = false, true
		}
	}
	nat := func(n *testnet.Network) testnet.Service {
		return testnet.Service{Name: "web", VIPs: both, Port: 80, TargetPort: 8080, Protocol: "TCP", Mode: "NAT", Servers: n.Backends()}
	}
	n := network(t, nodes, func(n *testnet.Network) {
		for _, node := range n.Backends() {
			serve(t, node.Namespace, 8080, 5353)
		}
	}, nat)
	lb := map[string]bool{}
	for _, node := range n.LoadBalancers() {
		lb[node.Address4.String()], lb[node.Address6.String()] = true, true
	}
	for _, vip := range both {
		seen := map[string]int{}
		for range 300 {
			server, client, err := who(n.Client, vip)
			must(t, err)
			if !lb[client] {
				t.Fatalf("the server saw %s, which is no LB node", client)
			}
			seen[server]++
		}
		if len(seen) != 4 {
			t.Errorf("%v answered", seen)
		}
		const size = 16 << 20
		c, err := dial(n.Client, "tcp", vip, 80)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(30*time.Second)))
		_, err = fmt.Fprintf(c, "get %d\n", size)
		must(t, err)
		if got, err := io.Copy(io.Discard, c); err != nil || got != size {
			t.Errorf("%s: %d of %d bytes, %v", vip, got, size, err)
		}
		c.Close()
	}
	var held []net.Conn
	for range 60 {
		c, err := dial(n.Client, "tcp", vip4, 80)
		must(t, err)
		defer c.Close()
		held = append(held, c)
	}
	service := nat(n)
	service.Servers, service.Leaving = n.Backends()[1:], n.Backends()[:1]
	must(t, n.WriteService(service))
	time.Sleep(500 * time.Millisecond)
	for range 60 {
		server, _, err := who(n.Client, vip4)
		must(t, err)
		if server == n.Backends()[0].Label {
			t.Fatal("a new connection went to the server that leaves")
		}
	}
	stillAnswer(t, held)
}

// DNS by way of mode NAT.
func TestNATDatagrams(t *testing.T) {
	nodes := testnet.DefaultNodes()
	n := network(t, nodes, nil, func(n *testnet.Network) testnet.Service {
		s := dns(n)
		s.Mode = "NAT"
		return s
	})
	for _, vip := range both {
		for range 100 {
			c, err := dial(n.Client, "udp", vip, 53)
			must(t, err)
			must(t, c.SetDeadline(time.Now().Add(patience)))
			_, err = c.Write([]byte("question"))
			must(t, err)
			buffer := make([]byte, 2048)
			if _, err := c.Read(buffer); err != nil {
				t.Fatalf("%s: %v", vip, err)
			}
			c.Close()
		}
	}
}
