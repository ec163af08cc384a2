// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/status"
	"fairlead.dev/fairlead/internal/testnet"
)

// What a cluster has on its workers: masquerade of what leaves for elsewhere,
// and a firewall that drops what connection tracking calls invalid.
const clusterRules = `
table inet cluster {
	chain forward { type filter hook forward priority 0; ct state invalid counter drop; }
	chain post { type nat hook postrouting priority 100; oifname "eth0" ip saddr 10.244.0.0/16 masquerade; oifname "eth0" ip6 saddr fd00:244::/32 masquerade; }
}`

func TestGeneveBesideAClustersRules(t *testing.T) {
	need.Tool(t, "nft")
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) {
		for _, node := range n.Backends() {
			if out, err := node.Run("nft", clusterRules); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
		}
	}, web, dns)
	requests(t, n, 1000, 8)
	direct(t, n)
	for _, vip := range both {
		for _, size := range []int{1, 100, 1000} {
			for range 50 {
				if err := exchange(n.Client, vip, size); err != nil {
					t.Fatalf("%s, %d bytes: %v", vip, size, err)
				}
			}
		}
	}
}

// 1 GiB each way, by both families; the client's own packets are as large as
// its link takes, which is more than fits the tunnel: MSS was clamped.
func TestLargeTransfers(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, web)
	const size = 1 << 29 // twice by each family
	for _, vip := range both {
		c, err := dial(n.Client, "tcp", vip, 80)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
		fmt.Fprintf(c, "put %d\n", size)
		sum := sha256.New()
		_, err = io.CopyN(io.MultiWriter(c, sum), stream(), size)
		must(t, err)
		got, err := readLine(c)
		must(t, err)
		if want := fmt.Sprintf("%x", sum.Sum(nil)); got != want {
			t.Errorf("%s: sent %s, the server got %s", vip, want, got)
		}
		c.Close()
		c, err = dial(n.Client, "tcp", vip, 80)
		must(t, err)
		must(t, c.SetDeadline(time.Now().Add(2*time.Minute)))
		fmt.Fprintf(c, "get %d\n", size)
		back := sha256.New()
		if read, err := io.Copy(back, c); err != nil || read != size {
			t.Errorf("%s: %d bytes came back: %v", vip, read, err)
		}
		if fmt.Sprintf("%x", back.Sum(nil)) != fmt.Sprintf("%x", sum.Sum(nil)) {
			t.Errorf("%s: other bytes came back", vip)
		}
		c.Close()
	}
}

// Datagrams larger than the path's MTU go in fragments, in both directions;
// the first tries may be lost while the client learns the path's MTU.
func TestLargeDatagrams(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, dns)
	for _, vip := range both {
		for _, size := range []int{1450, 4000, 20000} {
			var err error
			for range 5 {
				if err = exchange(n.Client, vip, size); err == nil {
					break
				}
			}
			if err != nil {
				t.Errorf("%s, %d bytes: %v", vip, size, err)
			}
		}
	}
}

// A server that holds the VIP itself gets ipip, and its own stack answers.
func TestIPIPToServersThatHoldTheVIP(t *testing.T) {
	nodes := testnet.DefaultNodes()
	for i := range nodes {
		nodes[i].Pods = 0
	}
	held := func(n *testnet.Network) testnet.Service {
		return testnet.Service{Name: "web", VIPs: both, Port: 80, TargetPort: 80, Protocol: "TCP", Mode: "IPIP", Servers: n.Backends()}
	}
	n := network(t, nodes, func(n *testnet.Network) {
		for _, node := range n.Backends() {
			holdVIPs(t, node)
			serve(t, node.Namespace, 80, 53)
		}
	}, held)
	requests(t, n, 1000, 4)
	direct(t, n)
}

// A small cluster: every node is both, on one interface. Pods on the LB node
// that a packet meets get it without a tunnel.
func TestBothRolesOnOneNode(t *testing.T) {
	var nodes []testnet.NodeSpec
	for i := range 3 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("node-%d", i+1), LoadBalancer: true, Backend: true, Pods: 2, Agent: true})
	}
	n := network(t, nodes, nil, web, dns)
	requests(t, n, 300, 6)
	for _, vip := range both {
		for range 100 {
			if err := exchange(n.Client, vip, 100); err != nil {
				t.Fatal(err)
			}
		}
	}
	local := 0
	for _, node := range n.Nodes {
		d, err := node.Status()
		must(t, err)
		for _, s := range d.Services {
			for _, b := range s.Backends {
				if b.Mode == "Local" && b.Connections > 0 {
					local++
				}
			}
		}
	}
	if local == 0 {
		t.Error("no connection stayed on its node")
	}
}

// A changed file takes effect; a bad one changes nothing; agents that are
// killed stop nothing, and ones that start again adopt, also for connections
// that were open all the while.
func TestChangesAndCrashes(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, func(n *testnet.Network) testnet.Service {
		s := web(n)
		s.Pods = s.Pods[:2]
		return s
	})
	requests(t, n, 100, 2)
	must(t, n.WriteService(web(n)))
	must(t, n.WaitProgrammed(8, 10*time.Second))
	requests(t, n, 200, 8)

	must(t, n.WriteObjects("bad.yaml", "kind: Sevrice\n"))
	time.Sleep(500 * time.Millisecond)
	requests(t, n, 100, 8)
	d, err := n.Nodes[0].Status()
	must(t, err)
	if len(d.Findings) != 1 || d.Findings[0].Code != "FL0005" || !d.Programmed {
		t.Errorf("findings %v, programmed %v", d.Findings, d.Programmed)
	}
	must(t, os.Remove(n.ObjectsDir()+"/bad.yaml"))

	var open []net.Conn
	for range 20 {
		for _, vip := range both {
			c, err := dial(n.Client, "tcp", vip, 80)
			must(t, err)
			defer c.Close()
			open = append(open, c)
		}
	}
	for _, node := range n.Nodes {
		node.AgentProcess().Kill()
	}
	requests(t, n, 200, 8)
	for _, node := range n.Nodes {
		must(t, node.StartAgent(binary))
	}
	requests(t, n, 100, 8)
	must(t, n.WaitProgrammed(8, 30*time.Second))
	requests(t, n, 100, 8)
	for _, c := range open {
		must(t, c.SetDeadline(time.Now().Add(patience)))
		_, err := fmt.Fprintln(c, "who")
		must(t, err)
		if _, err := readLine(c); err != nil {
			t.Errorf("a connection that was open all the while: %v", err)
		}
	}
}

// Nothing that a stranger, a client or a Pod sends into a tunnel is delivered.
func TestSpoofedTunnels(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), nil, web)
	worker := n.Backends()[0]
	before, err := worker.Status()
	must(t, err)
	for who, from := range map[string]*testnet.Namespace{"stranger": n.Stranger, "client": n.Client, "pod": n.Backends()[1].Pods[0].Namespace} {
		must(t, from.Do(func() error {
			c, err := net.Dial("udp", netip.AddrPortFrom(worker.Address4, testnet.GenevePort).String())
			if err != nil {
				return err
			}
			defer c.Close()
			for range 10 {
				if _, err := c.Write(make([]byte, 200)); err != nil && !strings.Contains(err.Error(), "refused") {
					return fmt.Errorf("%s: %w", who, err)
				}
			}
			return nil
		}))
	}
	deadline := time.Now().Add(patience)
	for drops(t, worker, "tunnel_source") < 20 || drops(t, n.Backends()[1], "from_pod_tunnel") < 10 {
		if time.Now().After(deadline) {
			t.Fatalf("dropped: %d of strangers, %d of the Pod", drops(t, worker, "tunnel_source"), drops(t, n.Backends()[1], "from_pod_tunnel"))
		}
		time.Sleep(50 * time.Millisecond)
	}
	after, err := worker.Status()
	must(t, err)
	if delivered(after.Events) != delivered(before.Events) {
		t.Error("something was delivered")
	}
}

func delivered(events []status.Count) uint64 {
	for _, e := range events {
		if e.Name == "delivered" {
			return e.Count
		}
	}
	return 0
}
