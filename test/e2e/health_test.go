// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/status"
	"fairlead.dev/fairlead/internal/testnet"
)

const checkPort = 8081

// checked is an HTTP server in each Pod that says whether the Pod is well.
type checked map[string]*atomic.Int32 // codes by Pod; 0: no answer at all

func answerChecks(t *testing.T, n *testnet.Network) checked {
	t.Helper()
	all := checked{}
	for _, pod := range n.AllPods() {
		code := &atomic.Int32{}
		code.Store(200)
		all[pod.Label] = code
		var listener net.Listener
		must(t, pod.Do(func() (err error) {
			listener, err = net.Listen("tcp", fmt.Sprintf(":%d", checkPort))
			return err
		}))
		done := make(chan struct{})
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if code.Load() == 0 {
				<-done
				return
			}
			w.WriteHeader(int(code.Load()))
		})}
		t.Cleanup(func() { close(done); server.Close() })
		go server.Serve(listener)
	}
	return all
}

func checkedWeb(check string) func(*testnet.Network) testnet.Service {
	return func(n *testnet.Network) testnet.Service {
		s := web(n)
		s.Policy = "healthCheck: {" + check + "}"
		return s
	}
}

// backendOf returns what an LB node says of a Pod in the service at a VIP.
func backendOf(n *testnet.Node, pod *testnet.Pod) (status.Backend, status.Service, error) {
	d, err := n.Status()
	if err != nil {
		return status.Backend{}, status.Service{}, err
	}
	for _, s := range d.Services {
		for _, b := range s.Backends {
			if strings.HasPrefix(b.Address, pod.Address4.String()+":") {
				return b, s, nil
			}
		}
	}
	return status.Backend{}, status.Service{}, fmt.Errorf("%s is no backend", pod.Label)
}

// everyLB waits until all LB nodes say something of a Pod.
func everyLB(t *testing.T, n *testnet.Network, pod *testnet.Pod, f func(status.Backend, status.Service) bool) {
	t.Helper()
	for _, node := range n.LoadBalancers() {
		eventually(t, func() error {
			b, s, err := backendOf(node, pod)
			if err == nil && !f(b, s) {
				err = fmt.Errorf("%s says %+v", node.Name(), b)
			}
			return err
		})
	}
}

// A Pod whose check fails takes no new connections and keeps those that it has;
// when all fail, all are used, and it is said; when they pass again, all is as
// before.
func TestHealthCheck(t *testing.T) {
	var checks checked
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) { checks = answerChecks(t, n) },
		checkedWeb("kind: HTTP, port: 8081, path: /healthz, interval: 300ms, timeout: 300ms, rise: 2, fall: 3"))
	sick := n.AllPods()[0]
	passes := func(b status.Backend, s status.Service) bool {
		return b.Check == "passes" && b.State == "active" && s.Problem == ""
	}
	for _, pod := range n.AllPods() {
		everyLB(t, n, pod, passes)
	}
	var held []net.Conn
	for range 40 {
		c, err := dial(n.Client, "tcp", vip4, 80)
		must(t, err)
		defer c.Close()
		held = append(held, c)
	}
	checks[sick.Label].Store(503)
	everyLB(t, n, sick, func(b status.Backend, _ status.Service) bool {
		return b.State == "failing" && b.Slots == 0 && strings.Contains(b.Check, "503")
	})
	for range 200 {
		server, _, err := who(n.Client, vip4)
		must(t, err)
		if server == sick.Label {
			t.Fatal("a new connection went to the Pod that is sick")
		}
	}
	stillAnswer(t, held)
	for _, code := range checks {
		code.Store(500)
	}
	everyLB(t, n, sick, func(b status.Backend, s status.Service) bool { return s.Problem != "" && b.State == "active" })
	requests(t, n, 100, 8)
	for _, code := range checks {
		code.Store(200)
	}
	for _, pod := range n.AllPods() {
		everyLB(t, n, pod, passes)
	}
	requests(t, n, 100, 8)
}

// A tunnel that is broken is a backend that is not healthy: the probe travels as
// the traffic does.
func TestHealthCheckSeesABrokenTunnel(t *testing.T) {
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) { answerChecks(t, n) },
		checkedWeb("kind: TCP, interval: 300ms, timeout: 300ms, rise: 1, fall: 3"))
	worker := n.Backends()[0]
	sick := worker.Pods[0]
	everyLB(t, n, sick, func(b status.Backend, _ status.Service) bool { return b.Check == "passes" })
	must(t, n.Router.SetRoute(testnet.Route{To: hostPrefix(worker.Address4), Blackhole: true}))
	for _, pod := range worker.Pods {
		everyLB(t, n, pod, func(b status.Backend, _ status.Service) bool {
			return b.State == "failing" && strings.Contains(b.Check, "timeout")
		})
	}
	requests4(t, n, 100, 6)
}

// How long a Pod gets new connections after its server ended, its link was
// dropped, or it hung, at three settings.
func TestHealthCheckTimes(t *testing.T) {
	for _, setting := range []struct {
		text string
		most time.Duration
	}{
		{"interval: 100ms, timeout: 50ms, rise: 2, fall: 1", 5 * time.Second},
		{"interval: 500ms, timeout: 250ms, rise: 2, fall: 2", 10 * time.Second},
		{"interval: 1s, timeout: 500ms, rise: 2, fall: 3", 15 * time.Second},
	} {
		var checks checked
		n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) { checks = answerChecks(t, n) },
			checkedWeb("kind: HTTP, port: 8081, "+setting.text))
		fail := []struct {
			how string
			f   func(*testnet.Pod)
		}{
			{"says 503", func(p *testnet.Pod) { checks[p.Label].Store(503) }},
			{"hangs", func(p *testnet.Pod) { checks[p.Label].Store(0) }},
			{"link dropped", func(p *testnet.Pod) { must(t, p.SetDown(testnet.Uplink)) }},
		}
		for i, failure := range fail {
			pod := n.AllPods()[2*i]
			everyLB(t, n, pod, func(b status.Backend, _ status.Service) bool { return b.Check == "passes" })
			began := time.Now()
			failure.f(pod)
			for _, node := range n.LoadBalancers() {
				for {
					b, _, err := backendOf(node, pod)
					must(t, err)
					if b.State == "failing" {
						break
					}
					if time.Since(began) > 3*setting.most {
						t.Fatalf("%s still uses %s", node.Name(), pod.Label)
					}
					time.Sleep(5 * time.Millisecond)
				}
			}
			took := time.Since(began)
			t.Logf("%s; %s: no new flows on any of 3 LB nodes after %s", setting.text, failure.how, took.Round(time.Millisecond))
			if took > setting.most {
				t.Errorf("that is more than %s", setting.most)
			}
		}
	}
}

// With one prober a backend, each is probed by one LB node alone, all of them
// know what it found, and others take over what a lost one probed.
func TestHealthCheckShared(t *testing.T) {
	var checks checked
	n := network(t, testnet.DefaultNodes(), func(n *testnet.Network) { checks = answerChecks(t, n) },
		checkedWeb("kind: HTTP, port: 8081, interval: 300ms, timeout: 300ms, rise: 1, fall: 2, probers: 1"))
	passes := func(b status.Backend, _ status.Service) bool { return b.Check == "passes" && b.State == "active" }
	for _, pod := range n.AllPods() {
		everyLB(t, n, pod, passes)
	}
	pod := n.AllPods()[0]
	checks[pod.Label].Store(503)
	everyLB(t, n, pod, func(b status.Backend, _ status.Service) bool {
		return b.State == "failing" && strings.Contains(b.Check, "503")
	})
	checks[pod.Label].Store(200)
	everyLB(t, n, pod, passes)
	probing := 0
	for _, node := range n.LoadBalancers() {
		d, err := node.Status()
		must(t, err)
		for _, e := range d.Events {
			if e.Name == "probe" {
				probing++
				t.Logf("%s sent %d packets of probes", node.Name(), e.Count)
			}
		}
	}
	if probing < 2 {
		t.Errorf("%d LB nodes probe", probing)
	}
	// All but one are lost: that one probes all.
	for _, node := range n.LoadBalancers()[1:] {
		node.AgentProcess().Kill()
	}
	last := n.LoadBalancers()[0]
	time.Sleep(11 * time.Second)
	for _, pod := range n.AllPods() {
		checks[pod.Label].Store(500)
		eventually(t, func() error {
			b, _, err := backendOf(last, pod)
			if err == nil && !strings.Contains(b.Check, "500") {
				err = fmt.Errorf("%s says %q of %s", last.Name(), b.Check, pod.Label)
			}
			return err
		})
	}
}
