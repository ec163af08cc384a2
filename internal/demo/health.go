// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/status"
	"fairlead.dev/fairlead/internal/testnet"
)

const (
	wellPort    = 8081
	wellCheck   = "healthCheck: {kind: HTTP, port: 8081, path: /healthz, interval: 200ms, timeout: 100ms, rise: 2, fall: 2}"
	wellPatient = 10 * time.Second
)

// wellness is what each Pod says to health checks: an HTTP code, or 0 to hang.
type wellness map[*testnet.Pod]*atomic.Int32

// Health lets servers fail in several ways, and shows how soon they get no new
// connections, and what becomes of those that they have.
func (d *Demo) Health(ctx context.Context) error {
	started := time.Now()
	d.say("Building a network: a client, a router with ECMP, 3 LB nodes, 4 workers with 2 Pods each ...")
	network, err := testnet.New(testnet.Config{Nodes: testnet.DefaultNodes()})
	if err != nil {
		return err
	}
	defer network.Close()
	d.net, d.tallies = network, newTallies()
	stop, err := d.serve()
	if err != nil {
		return err
	}
	defer stop()
	well, stopChecks, err := d.serveChecks()
	if err != nil {
		return err
	}
	defer stopChecks()
	web := testnet.Service{Name: "web", VIPs: vips, Port: 80, TargetPort: 8080, Protocol: "TCP", Pods: network.AllPods(), Policy: wellCheck}
	d.say("Starting 7 real fairlead agents; each LB node probes each Pod every 200 ms, through the tunnel that carries the traffic ...")
	if err := errors.Join(network.WriteNodes(), network.WriteService(web), network.StartAgents(d.Binary)); err != nil {
		return err
	}
	if err := network.WaitProgrammed(len(network.AllPods()), 30*time.Second); err != nil {
		return err
	}
	passes := func(b status.Backend, s status.Service) bool { return b.Check == "passes" && b.State == "active" }
	for _, pod := range network.AllPods() {
		if _, err := d.await(ctx, pod, passes); err != nil {
			return err
		}
	}
	clients, done := context.WithCancel(ctx)
	var wait sync.WaitGroup
	var asked, failed atomic.Int64
	wait.Go(func() {
		for clients.Err() == nil {
			asked.Add(1)
			if d.request(vips[0]) != nil && clients.Err() == nil {
				failed.Add(1)
			}
		}
	})
	c := claims{demo: d}
	worst, err := d.failures(ctx, well, &failed, &c)
	done()
	wait.Wait()
	if err != nil {
		return err
	}
	c.claim(asked.Load() > 100, "%d requests were made meanwhile, one after the other", asked.Load())
	if err := errors.Join(c.wrong...); err != nil {
		return fmt.Errorf("not as claimed: %w", err)
	}
	d.say("health: a Pod that fails gets no new connection from any of 3 LB nodes after %d ms at most; %d of %d requests failed until then; all failing, all are used; %.1f s",
		worst.Milliseconds(), failed.Load(), asked.Load(), time.Since(started).Seconds())
	return nil
}

// failures lets Pods fail one after the other, and returns the longest time
// until the last LB node gave one no new flows.
func (d *Demo) failures(ctx context.Context, well wellness, failed *atomic.Int64, c *claims) (worst time.Duration, err error) {
	pods := d.net.AllPods()
	out := func(b status.Backend, _ status.Service) bool { return b.State == "failing" && b.Slots == 0 }
	d.say("\n%-52s %12s   %s", "", "no new after", "requests failed so far")
	for i, step := range []struct {
		text string
		do   func(*testnet.Pod) error
	}{
		{"says 503", func(p *testnet.Pod) error { well[p].Store(503); return nil }},
		{"hangs: it accepts, and never answers", func(p *testnet.Pod) error { well[p].Store(0); return nil }},
		{"loses its link", func(p *testnet.Pod) error { return p.SetDown(testnet.Uplink) }},
	} {
		pod, began := pods[2*i], time.Now()
		if err := step.do(pod); err != nil {
			return worst, err
		}
		at, err := d.await(ctx, pod, out)
		if err != nil {
			return worst, err
		}
		took := at.Sub(began)
		worst = max(worst, took)
		d.say("%-52s %9d ms   %d", pod.Label+" "+step.text, took.Milliseconds(), failed.Load())
	}
	for _, code := range well {
		code.Store(500)
	}
	allUsed := func(b status.Backend, s status.Service) bool { return s.Problem != "" && b.State == "active" }
	if _, err := d.await(ctx, pods[7], allUsed); err != nil {
		return worst, err
	}
	d.say("every Pod says 500: all of them are used, and status says so")
	c.claim(true, "all failing, every backend is used: checks can be wrong")
	for _, pod := range pods {
		well[pod].Store(200)
	}
	back := func(b status.Backend, s status.Service) bool {
		return b.Check == "passes" && b.State == "active" && s.Problem == ""
	}
	_, err = d.await(ctx, pods[7], back)
	c.claim(err == nil, "they pass again, and take new connections as before")
	return worst, err
}

// await waits until all LB nodes say something of a Pod, and returns when.
func (d *Demo) await(ctx context.Context, pod *testnet.Pod, f func(status.Backend, status.Service) bool) (time.Time, error) {
	deadline := time.Now().Add(wellPatient)
	for _, node := range d.net.LoadBalancers() {
		for {
			document, err := node.Status()
			if err != nil {
				return time.Time{}, err
			}
			if says(document, pod.Address4, f) {
				break
			}
			if time.Now().After(deadline) || !sleepFor(ctx, 5*time.Millisecond) {
				return time.Time{}, fmt.Errorf("%s did not notice what %s does", node.Name(), pod.Label)
			}
		}
	}
	return time.Now(), nil
}

func says(document status.Document, pod netip.Addr, f func(status.Backend, status.Service) bool) bool {
	for _, s := range document.Services {
		for _, b := range s.Backends {
			if strings.HasPrefix(b.Address, pod.String()+":") {
				return f(b, s)
			}
		}
	}
	return false
}

// serveChecks answers health checks in every Pod.
func (d *Demo) serveChecks() (well wellness, stop func(), err error) {
	well = wellness{}
	hang := make(chan struct{})
	var servers []*http.Server
	stop = func() {
		close(hang)
		for _, s := range servers {
			s.Close()
		}
	}
	for _, pod := range d.net.AllPods() {
		code := &atomic.Int32{}
		code.Store(http.StatusOK)
		well[pod] = code
		var l net.Listener
		if err := pod.Do(func() (err error) {
			l, err = net.Listen("tcp", fmt.Sprintf(":%d", wellPort))
			return err
		}); err != nil {
			stop()
			return nil, nil, fmt.Errorf("serve in %s: %w", pod.Label, err)
		}
		s := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			if code.Load() == 0 {
				<-hang
				return
			}
			w.WriteHeader(int(code.Load()))
		})}
		servers = append(servers, s)
		go s.Serve(l)
	}
	return well, stop, nil
}
