// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/status"
	"fairlead.dev/fairlead/internal/testnet"
)

const (
	honestClients = 1000
	honestAtOnce  = 50
	floodTime     = 40 * time.Second // at most
	floodRound    = 12 * time.Second // for the honest clients of one round
)

// claims are what was said to be so.
type claims struct {
	demo  *Demo
	wrong []error
}

func (c *claims) claim(holds bool, format string, args ...any) {
	mark := "ok   "
	if !holds {
		mark = "WRONG"
		c.wrong = append(c.wrong, fmt.Errorf(format, args...))
	}
	c.demo.say("%s %s", mark, fmt.Sprintf(format, args...))
}

// Flood lets honest clients connect to a server while it is flooded with SYNs
// from made-up addresses, without SYN cookies at its node and with them.
func (d *Demo) Flood(ctx context.Context) error {
	started := time.Now()
	d.say("Building a network: a client, a router, an LB node, a worker with a Pod ...")
	network, err := testnet.New(testnet.Config{Nodes: []testnet.NodeSpec{
		{Name: "lb-1", LoadBalancer: true, Agent: true}, {Name: "worker-1", Backend: true, Pods: 1, Agent: true}}})
	if err != nil {
		return err
	}
	defer network.Close()
	d.net, d.tallies = network, newTallies()
	pod := network.AllPods()[0]
	// Its kernel takes cookies that it did not send itself.
	if err := pod.Sysctl(map[string]string{"ipv4/tcp_syncookies": "2", "ipv4/tcp_max_syn_backlog": "128", "ipv4/tcp_no_metrics_save": "1"}); err != nil {
		return err
	}
	stop, err := d.serve()
	if err != nil {
		return err
	}
	defer stop()
	web := testnet.Service{Name: "web", VIPs: vips, Port: 80, TargetPort: 8080, Protocol: "TCP", Pods: network.AllPods()}
	if err := errors.Join(network.WriteNodes(), network.WriteService(web), network.StartAgents(d.Binary)); err != nil {
		return err
	}
	if err := network.WaitProgrammed(1, 30*time.Second); err != nil {
		return err
	}
	calm := d.honest(ctx, honestClients)
	d.say("%d of %d honest clients connect and are answered, nothing else happens", calm, honestClients)
	// Now a server whose kernel knows no cookies, and so needs room for each SYN.
	if err := pod.Sysctl(map[string]string{"ipv4/tcp_syncookies": "0"}); err != nil {
		return err
	}
	flooding, end := context.WithTimeout(ctx, floodTime)
	defer end()
	type result struct {
		sent uint64
		err  error
	}
	flooded, began := make(chan result, 1), time.Now()
	go func() {
		sent, err := network.Flood(flooding, network.LoadBalancers()[0], netip.AddrPortFrom(vips[0], 80))
		flooded <- result{sent, err}
	}()
	if !sleepFor(ctx, time.Second) {
		return ctx.Err()
	}
	without := d.honest(ctx, honestClients)
	d.say("%d of %d while SYNs from made-up addresses come in as fast as this machine can send them", without, honestClients)
	web.Policy = "synCookies: {threshold: 2000}"
	if err := errors.Join(pod.Sysctl(map[string]string{"ipv4/tcp_syncookies": "2"}), network.WriteService(web)); err != nil {
		return err
	}
	if err := d.awaitCookies(ctx); err != nil {
		return err
	}
	with := d.honest(ctx, honestClients)
	d.say("%d of %d once the worker answers SYNs with cookies (synCookies: {threshold: 2000})", with, honestClients)
	end()
	flood := <-flooded
	if flood.err != nil {
		return flood.err
	}
	rate := float64(flood.sent) / time.Since(began).Seconds()
	c := claims{demo: d}
	c.claim(calm == honestClients, "%d of %d honest clients got through before the flood", calm, honestClients)
	c.claim(with >= honestClients*95/100, "%d of %d got through it with cookies", with, honestClients)
	c.claim(without < with, "%d of %d without", without, honestClients)
	if err := errors.Join(c.wrong...); err != nil {
		return fmt.Errorf("not as claimed: %w", err)
	}
	d.say("flood: %d of %d honest clients connected while %.0f SYNs a second came from made-up addresses, without cookies %d; %.1f s",
		with, honestClients, rate, without, time.Since(started).Seconds())
	return nil
}

// awaitCookies waits until the worker sends cookies.
func (d *Demo) awaitCookies(ctx context.Context) error {
	for deadline := time.Now().Add(wellPatient); time.Now().Before(deadline); {
		document, err := d.net.Backends()[0].Status()
		if err == nil && slices.ContainsFunc(document.Events, func(c status.Count) bool { return c.Name == "cookie_sent" }) {
			return nil
		}
		if !sleepFor(ctx, 50*time.Millisecond) {
			return ctx.Err()
		}
	}
	return errors.New("the worker sends no cookies")
}

// honest lets clients make a request each, a few at a time, and returns how
// many were answered in time.
func (d *Demo) honest(ctx context.Context, clients int) int {
	ctx, cancel := context.WithTimeout(ctx, floodRound)
	defer cancel()
	var answered atomic.Int64
	var wait sync.WaitGroup
	next := make(chan struct{})
	for range honestAtOnce {
		wait.Go(func() {
			for range next {
				if d.request(vips[0]) == nil {
					answered.Add(1)
				}
			}
		})
	}
	for i := 0; i < clients && ctx.Err() == nil; i++ {
		select {
		case next <- struct{}{}:
		case <-ctx.Done():
		}
	}
	close(next)
	wait.Wait()
	return int(answered.Load())
}
