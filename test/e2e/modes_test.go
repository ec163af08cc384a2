// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

// way is one way of reaching backends, under changes.
type way struct {
	name string
	edit func(*testnet.Service)
	held bool // by servers on a segment with the LB nodes, not by Pods
}

var ways = []way{
	{"NAT", func(s *testnet.Service) { s.Mode = "NAT" }, false},
	{"affinity", func(s *testnet.Service) { s.Spec = "sessionAffinity: ClientIP" }, false},
	{"L2", func(s *testnet.Service) { s.Mode = "L2" }, true},
	{"IPIP", func(s *testnet.Service) { s.Mode = "IPIP" }, true},
}

// network is one with an echo service of each protocol, reached in this way.
func (w way) network(t *testing.T, extra string) *testnet.Network {
	t.Helper()
	var nodes []testnet.NodeSpec
	for i := range 2 {
		nodes = append(nodes, testnet.NodeSpec{Name: fmt.Sprintf("lb-%d", i+1), LoadBalancer: true, Agent: true, Extra: extra})
	}
	for i := range 3 {
		spec := testnet.NodeSpec{Name: fmt.Sprintf("worker-%d", i+1), Backend: true, Agent: true}
		if !w.held {
			spec.Pods = 2
		}
		nodes = append(nodes, spec)
	}
	return networkOf(t, testnet.Config{Nodes: nodes, LAN: w.held}, func(n *testnet.Network) {
		for _, pod := range n.AllPods() {
			echo(t, pod.Namespace)
		}
		if !w.held {
			return
		}
		for _, node := range n.Backends() {
			holdVIPs(t, node)
			echoLines(t, node.Namespace)
			for _, vip := range both {
				echoDatagrams(t, node.Namespace, vip.String())
			}
		}
	}, func(n *testnet.Network) testnet.Service { return w.service(n, "TCP", -1) },
		func(n *testnet.Network) testnet.Service { return w.service(n, "UDP", -1) })
}

// service is the echo service with those backends taking new flows whose bits
// are set; the others are leaving.
func (w way) service(n *testnet.Network, protocol string, active int) testnet.Service {
	s := echoes(protocol, nil, nil)
	w.edit(&s)
	pick := func(i int) bool { return active&(1<<i) != 0 }
	for i, pod := range n.AllPods() {
		if pick(i) {
			s.Pods = append(s.Pods, pod)
		} else {
			s.Draining = append(s.Draining, pod)
		}
	}
	if !w.held {
		return s
	}
	for i, node := range n.Backends() {
		if pick(i) {
			s.Servers = append(s.Servers, node)
		} else {
			s.Leaving = append(s.Leaving, node)
		}
	}
	return s
}

func (w way) churn(t *testing.T, n *testnet.Network, times int, pause time.Duration) {
	t.Helper()
	backends := max(len(n.AllPods()), len(n.Backends()))
	for range times {
		active := 1 + rand.IntN(1<<backends-1)
		if w.held {
			active = 1 + rand.IntN(1<<len(n.Backends())-1)
		}
		must(t, n.WriteService(w.service(n, "TCP", active)))
		must(t, n.WriteService(w.service(n, "UDP", active)))
		time.Sleep(pause)
	}
}

// Whatever way backends are reached, conversations outlive changes of who takes
// new ones.
func TestConversationsOutliveChangesInEveryMode(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			n := w.network(t, "")
			tcp := startTalks(t, n.Client, "tcp", *conversations/3)
			udp := startTalks(t, n.Client, "udp", *conversations/10)
			w.churn(t, n, 6, 300*time.Millisecond)
			more := startTalks(t, n.Client, "tcp", *conversations/6) // while slots are contested
			if w.held {
				// Nobody can be asked: who says nothing between two changes of its
				// slot is on no record.
				w.churn(t, n, 6, 300*time.Millisecond)
			} else {
				w.churn(t, n, 40, 50*time.Millisecond)
			}
			for what, talks := range map[string]*talks{"tcp": tcp, "udp": udp, "tcp, begun meanwhile": more} {
				if wrong, summary := talks.stop(); wrong > 0 {
					t.Errorf("%s: %s", what, summary)
				} else {
					t.Logf("%s: %s", what, summary)
				}
			}
		})
	}
}

// The control: where nobody remembers, the same changes break conversations.
func TestChangesBreakAPureHashInEveryMode(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			n := w.network(t, "pureHash: true\n")
			tcp := startTalks(t, n.Client, "tcp", 100)
			for _, active := range []int{1, 6, 2, 5, 4} {
				must(t, n.WriteService(w.service(n, "TCP", active)))
				time.Sleep(300 * time.Millisecond)
			}
			wrong, summary := tcp.stop()
			t.Log(summary)
			if wrong == 0 {
				t.Error("nothing broke")
			}
		})
	}
}
