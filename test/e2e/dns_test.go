// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/need"
	"fairlead.dev/fairlead/internal/testnet"
)

// answerer answers datagrams until it is stopped.
func answerer(t *testing.T, n *testnet.Namespace) (stop func()) {
	t.Helper()
	var c net.PacketConn
	must(t, n.Do(func() (err error) {
		c, err = net.ListenPacket("udp", ":5300")
		return err
	}))
	go func() {
		buffer := make([]byte, 512)
		for {
			size, from, err := c.ReadFrom(buffer)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(buffer[:size], from)
		}
	}()
	return func() { c.Close() }
}

// resolvers ask 200 times a second, each from a port that stays the same, and
// count what is not answered in time; nothing is asked twice.
func resolvers(t *testing.T, n *testnet.Namespace, vips ...netip.Addr) (stop func() (asked, unanswered int64)) {
	t.Helper()
	const each = 4
	var asked, unanswered atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	for i := range each {
		c, err := dial(n, "udp", vips[i%len(vips)], 53)
		must(t, err)
		go func() {
			defer func() { c.Close(); done <- struct{}{} }()
			answers := make(map[string]time.Time)
			buffer := make([]byte, 512)
			for number := 0; ctx.Err() == nil; number++ {
				query := fmt.Sprintf("query %d of %d", number, i)
				answers[query] = time.Now()
				asked.Add(1)
				_, _ = c.Write([]byte(query))
				next := time.Now().Add(time.Second * each / 200)
				for time.Now().Before(next) {
					_ = c.SetReadDeadline(next)
					if size, err := c.Read(buffer); err == nil {
						delete(answers, string(buffer[:size]))
					}
				}
			}
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			for len(answers) > 0 {
				size, err := c.Read(buffer)
				if err != nil {
					break
				}
				delete(answers, string(buffer[:size]))
			}
			unanswered.Add(int64(len(answers)))
		}()
	}
	return func() (int64, int64) {
		cancel()
		for range each {
			<-done
		}
		return asked.Load(), unanswered.Load()
	}
}

// All servers are replaced while the agents restart: every query is answered.
func TestDNSOutlivesItsServers(t *testing.T) {
	service := func(active, draining []*testnet.Pod) testnet.Service {
		return testnet.Service{Name: "dns", VIPs: both, Port: 53, TargetPort: 5300, Protocol: "UDP", Datagrams: "Independent", Pods: active, Draining: draining}
	}
	var stops []func()
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) {
		for _, node := range n.Backends() {
			stops = append(stops, answerer(t, node.Pods[0].Namespace))
			t.Cleanup(answerer(t, node.Pods[1].Namespace))
		}
	}, func(n *testnet.Network) testnet.Service {
		var first []*testnet.Pod
		for _, node := range n.Backends() {
			first = append(first, node.Pods[0])
		}
		return service(first, nil)
	})
	var old, fresh []*testnet.Pod
	for _, node := range n.Backends() {
		old, fresh = append(old, node.Pods[0]), append(fresh, node.Pods[1])
	}
	stop := resolvers(t, n.Client, both...)
	time.Sleep(500 * time.Millisecond)
	for i := range old {
		must(t, n.WriteService(service(append(append([]*testnet.Pod{}, fresh[:i+1]...), old[i+1:]...), old[:i+1])))
		node := n.Nodes[i]
		node.AgentProcess().Kill()
		must(t, node.StartAgent(binary))
		time.Sleep(500 * time.Millisecond)
	}
	must(t, n.WaitProgrammed(8, 30*time.Second))
	must(t, n.WriteService(service(fresh, nil)))
	must(t, n.WaitProgrammed(4, 30*time.Second))
	time.Sleep(200 * time.Millisecond) // what is under way to the old ones is answered
	for _, stop := range stops {
		stop()
	}
	time.Sleep(500 * time.Millisecond)
	asked, unanswered := stop()
	if unanswered > 0 || asked < 500 {
		t.Errorf("%d of %d queries were not answered", unanswered, asked)
	}
}

// The control: on the kernel's connection tracking the same clients go on
// asking a server that is gone.
func TestDNSOnConnectionTracking(t *testing.T) {
	need.Root(t)
	need.Tool(t, "nft")
	n, err := testnet.New(testnet.Config{Nodes: testnet.DefaultNodes()})
	must(t, err)
	t.Cleanup(n.Close)
	first, second := n.AllPods()[0], n.AllPods()[2]
	stopFirst := answerer(t, first.Namespace)
	t.Cleanup(answerer(t, second.Namespace))
	to := func(pod *testnet.Pod) {
		rules := fmt.Sprintf("add table ip t\nflush table ip t\ntable ip t {\nchain pre {\ntype nat hook prerouting priority dstnat;\nip daddr %s udp dport 53 dnat to %s:5300\n}\n}\n", vip4, pod.Address4)
		if out, err := n.Router.Run("sh", "-c", "printf '"+strings.ReplaceAll(rules, "\n", "\\n")+"' | nft -f -"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	to(first)
	stop := resolvers(t, n.Client, vip4)
	time.Sleep(500 * time.Millisecond)
	to(second)
	time.Sleep(200 * time.Millisecond)
	stopFirst()
	time.Sleep(time.Second)
	asked, unanswered := stop()
	t.Logf("%d of %d queries were not answered", unanswered, asked)
	if unanswered == 0 {
		t.Error("connection tracking lost nothing: the test above proves nothing")
	}
}
