// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"flag"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

var honest = flag.Int("honest", 1000, "how many honest clients connect during a flood of SYNs")

// Honest clients get through while a server is flooded with SYNs from made-up
// addresses, since their handshakes need no room; without cookies few do.
func TestSYNFlood(t *testing.T) {
	nodes := []testnet.NodeSpec{{Name: "lb-1", LoadBalancer: true, Agent: true}, {Name: "worker-1", Backend: true, Pods: 1, Agent: true}}
	share := map[bool]float64{}
	for _, cookies := range []bool{false, true} {
		n := network(t, nodes, func(n *testnet.Network) {
			// As a hard-pressed server has it: a short queue, and no way out but
			// cookies. Where they are made elsewhere, it has to take them.
			setting := map[string]string{"ipv4/tcp_syncookies": "0", "ipv4/tcp_max_syn_backlog": "128", "core/somaxconn": "128"}
			if cookies {
				setting["ipv4/tcp_syncookies"] = "2"
			}
			must(t, n.AllPods()[0].Sysctl(setting))
			serve(t, n.AllPods()[0].Namespace, 8088, 5300)
		}, func(n *testnet.Network) testnet.Service {
			s := web(n)
			s.TargetPort = 8088
			if cookies {
				s.Policy = "synCookies: {threshold: 2000}"
			}
			return s
		})
		ctx, stop := context.WithTimeout(context.Background(), 8*time.Second)
		flooded := make(chan uint64, 1)
		began := time.Now()
		go func() {
			sent, err := n.Flood(ctx, n.LoadBalancers()[0], netip.AddrPortFrom(vip4, 80))
			if err != nil {
				t.Error(err)
			}
			flooded <- sent
		}()
		time.Sleep(time.Second)
		succeeded := connectMany(n, *honest)
		stop()
		sent, took := <-flooded, time.Since(began)
		worker, err := n.Backends()[0].Status()
		must(t, err)
		events := map[string]uint64{}
		for _, e := range worker.Events {
			events[e.Name] = e.Count
		}
		forwarded := uint64(0)
		lb, err := n.LoadBalancers()[0].Status()
		must(t, err)
		for _, s := range lb.Services {
			forwarded += s.Connections
		}
		share[cookies] = float64(succeeded) / float64(*honest)
		t.Logf("cookies %v: %d of %d honest clients connected, and were answered, within 3 s; %.0f SYNs a second from made-up addresses were sent; the LB node forwarded %d; the worker made %d entries, sent %d cookies, and took %d",
			cookies, succeeded, *honest, float64(sent)/took.Seconds(), forwarded, events["flow_new"], events["cookie_sent"], events["cookie_accepted"])
	}
	if share[true] < 0.95 { // client, flood, nodes and server share the processors
		t.Errorf("with cookies %.1f%% got through", 100*share[true])
	}
	if share[false] > share[true] {
		t.Errorf("more got through without cookies: %.1f%%", 100*share[false])
	}
}

// connectMany lets clients connect, ask and be answered, a few at a time, and
// returns how many were within 3 s.
func connectMany(n *testnet.Network, clients int) int {
	var succeeded atomic.Int64
	var wait sync.WaitGroup
	next := make(chan struct{})
	for range 50 {
		wait.Go(func() {
			for range next {
				c, err := dialWithin(n.Client, "tcp", vip4, 80, 3*time.Second)
				if err != nil {
					continue
				}
				_ = c.SetDeadline(time.Now().Add(3 * time.Second))
				if _, err := c.Write([]byte("who\n")); err == nil {
					if _, err := readLine(c); err == nil {
						succeeded.Add(1)
					}
				}
				c.Close()
			}
		})
	}
	deadline := time.Now().Add(6 * time.Second)
	for i := 0; i < clients && time.Now().Before(deadline); i++ {
		next <- struct{}{}
	}
	close(next)
	wait.Wait()
	return int(succeeded.Load())
}
