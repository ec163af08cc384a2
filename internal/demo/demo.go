// SPDX-License-Identifier: Apache-2.0

// Package demo shows Fairlead at work on a throwaway network, and checks every
// claim that it makes.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"

	"fairlead.dev/fairlead/internal/status"
	"fairlead.dev/fairlead/internal/testnet"
)

const (
	connections = 300 // of each family
	exchanges   = 300 // of UDP, of each family
	workers     = 16
)

var vips = []netip.Addr{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8:f::10")}

// Demo is one run.
type Demo struct {
	Out    io.Writer
	Binary string // what to start agents with
	Live   bool   // redraw the picture in place

	net     *testnet.Network
	tallies *tallies
}

// FirstLight balances TCP and UDP over the Pods of four workers, and returns
// an error when anything was not as claimed.
func (d *Demo) FirstLight(ctx context.Context) error {
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
	if err := d.describe(); err != nil {
		return err
	}
	d.say("Starting 7 real fairlead agents, each in its own namespace ...")
	if err := network.StartAgents(d.Binary); err != nil {
		return err
	}
	if err := network.WaitProgrammed(len(network.AllPods()), 30*time.Second); err != nil {
		return err
	}
	d.say("All maps hold the plan. VIPs: %s and %s, TCP 80 and UDP 53.", vips[0], vips[1])
	d.say("The client opens %d TCP connections (HTTP) and sends %d UDP datagrams, half over IPv4, half over IPv6 ...", 2*connections, 2*exchanges)
	if err := d.load(ctx); err != nil {
		return err
	}
	documents, err := d.documents()
	if err != nil {
		return err
	}
	d.draw(documents)
	return d.conclude(documents, started)
}

func (d *Demo) say(format string, args ...any) {
	fmt.Fprintf(d.Out, "%s\n", fmt.Sprintf(format, args...))
}

// describe writes the objects that the agents read.
func (d *Demo) describe() error {
	web := testnet.Service{Name: "web", VIPs: vips, Port: 80, TargetPort: 8080, Protocol: "TCP", Pods: d.net.AllPods()}
	dns := testnet.Service{Name: "dns", VIPs: vips, Port: 53, TargetPort: 5353, Protocol: "UDP", Pods: d.net.AllPods()}
	return errors.Join(d.net.WriteNodes(), d.net.WriteService(web), d.net.WriteService(dns))
}

// load runs the clients, and draws while they run.
func (d *Demo) load(ctx context.Context) error {
	jobs := make(chan func() error)
	var wait sync.WaitGroup
	for range workers {
		wait.Add(1)
		go func() {
			defer wait.Done()
			for job := range jobs {
				d.tallies.note(job())
			}
		}()
	}
	drawing, done := context.WithCancel(ctx)
	wait.Add(1)
	go func() {
		defer wait.Done()
		d.animate(drawing)
	}()
	for i := range 2 * (connections + exchanges) {
		vip := vips[i%2]
		job := func() error { return d.request(vip) }
		if i/2%2 == 1 {
			job = func() error { return d.exchange(vip) }
		}
		select {
		case jobs <- job:
		case <-ctx.Done():
		}
	}
	close(jobs)
	done()
	wait.Wait()
	return ctx.Err()
}

// documents are the LB nodes' statuses.
func (d *Demo) documents() ([]status.Document, error) {
	var all []status.Document
	for _, node := range d.net.LoadBalancers() {
		document, err := node.Status()
		if err != nil {
			return nil, err
		}
		all = append(all, document)
	}
	return all, nil
}

// conclude checks every claim, and says them in the end in one line.
func (d *Demo) conclude(documents []status.Document, started time.Time) error {
	t := d.tallies
	var wrong []error
	claim := func(holds bool, format string, args ...any) {
		mark := "ok   "
		if !holds {
			mark = "WRONG"
			wrong = append(wrong, fmt.Errorf(format, args...))
		}
		d.say("%s %s", mark, fmt.Sprintf(format, args...))
	}
	total := 2 * (connections + exchanges)
	claim(t.answered == total, "%d of %d requests answered", t.answered, total)
	claim(t.kept == t.answered, "%d of %d servers saw the client's own address", t.kept, t.answered)
	claim(len(t.pods) == len(d.net.AllPods()), "%d of %d Pods took part", len(t.pods), len(d.net.AllPods()))
	busy := 0
	for _, document := range documents {
		if forwarded(document) > 0 {
			busy++
		}
	}
	claim(busy == len(documents), "%d of %d LB nodes forwarded", busy, len(documents))
	through, direct, err := d.answers()
	if err != nil {
		return err
	}
	claim(through == 0, "%d answers came back through an LB node", through)
	claim(direct > uint64(t.answered), "%d packets went straight from the workers to the client", direct)
	if t.last != nil {
		d.say("the last error: %v", t.last)
	}
	if err := errors.Join(wrong...); err != nil {
		return fmt.Errorf("not as claimed: %w", err)
	}
	d.say("first-light: %d/%d requests answered by %d Pods through %d LB nodes, client address kept in all, 0 answers through the LB, %.1f s",
		t.answered, total, len(t.pods), busy, time.Since(started).Seconds())
	return nil
}

func forwarded(document status.Document) uint64 {
	packets := uint64(0)
	for _, s := range document.Services {
		packets += s.Packets
	}
	return packets
}

// answers counts, on the router's links, packets from VIPs: on those of LB
// nodes in either direction, and from workers.
func (d *Demo) answers() (through, direct uint64, err error) {
	for _, node := range d.net.Nodes {
		sight, err := d.net.Watch.See(node)
		if err != nil {
			return 0, 0, err
		}
		if node.LoadBalancer {
			through += sight.AnswersTo + sight.AnswersFrom
		} else {
			direct += sight.AnswersFrom
		}
	}
	return through, direct, nil
}
