// SPDX-License-Identifier: Apache-2.0

package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"fairlead.dev/fairlead/internal/testnet"
)

const (
	conversations = 500
	talkPort      = 7000
	talkBeat      = 100 * time.Millisecond
	talkStall     = time.Second
	talkPatience  = 8 * time.Second
	settle        = 700 * time.Millisecond // between the steps
)

// conversation is one connection that goes on through everything.
type conversation struct {
	connection net.Conn
	client     netip.AddrPort
	vip        netip.AddrPort
	pod        string // that answered first

	mu      sync.Mutex
	said    int
	longest time.Duration
	broken  error
}

// Rollout lets 500 connections talk while all Pods are replaced, an LB node is
// lost and comes back, and an agent is killed; and computes, of the same
// connections, how many other ways of balancing would have broken.
func (d *Demo) Rollout(ctx context.Context) error {
	started := time.Now()
	d.say("Building a network: a client, a router with ECMP, 3 LB nodes, 4 workers with 2 Pods each ...")
	network, err := testnet.New(testnet.Config{Nodes: testnet.DefaultNodes()})
	if err != nil {
		return err
	}
	defer network.Close()
	d.net = network
	stop, err := d.serveTalks()
	if err != nil {
		return err
	}
	defer stop()
	before, after := d.generations()
	if err := errors.Join(network.WriteNodes(), d.roll(before, after, 0)); err != nil {
		return err
	}
	d.say("Starting 7 real fairlead agents, each in its own namespace ...")
	if err := network.StartAgents(d.Binary); err != nil {
		return err
	}
	if err := network.WaitProgrammed(len(before), 30*time.Second); err != nil {
		return err
	}
	d.say("The client opens %d connections to the first 4 Pods, and says something on each 10 times a second ...", conversations)
	all, err := d.converse()
	if err != nil {
		return err
	}
	talking, hush := context.WithCancel(ctx)
	defer hush()
	var talks sync.WaitGroup
	for _, c := range all {
		talks.Go(func() { c.talk(talking) })
	}
	others := newOthers(d, all)
	for i, event := range d.events(before, after) {
		if err := event.do(); err != nil {
			return err
		}
		if !sleepFor(ctx, settle) {
			return ctx.Err()
		}
		if err := others.look(); err != nil {
			return err
		}
		d.progress(i, event.text, all, others)
	}
	hush()
	talks.Wait()
	return d.concludeRollout(all, others, started)
}

func sleepFor(ctx context.Context, wait time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(wait):
		return true
	}
}

// generations are the Pods before and after the rolling update: one of each
// worker.
func (d *Demo) generations() (before, after []*testnet.Pod) {
	for _, node := range d.net.Backends() {
		before, after = append(before, node.Pods[0]), append(after, node.Pods[1])
	}
	return before, after
}

// roll describes the service with the first n Pods replaced; those that were
// still serve what they have.
func (d *Demo) roll(before, after []*testnet.Pod, n int) error {
	s := testnet.Service{Name: "talk", VIPs: vips, Port: talkPort, TargetPort: talkPort, Protocol: "TCP"}
	s.Pods = append(append(s.Pods, after[:n]...), before[n:]...)
	s.Draining = before[:n]
	return d.net.WriteService(s)
}

type rolloutEvent struct {
	text string
	do   func() error
}

func (d *Demo) events(before, after []*testnet.Pod) []rolloutEvent {
	lbs := d.net.LoadBalancers()
	replace := func(n int) rolloutEvent {
		return rolloutEvent{fmt.Sprintf("%s takes over from %s", after[n-1].Label, before[n-1].Label), func() error { return d.roll(before, after, n) }}
	}
	return []rolloutEvent{
		replace(1),
		{"lb-2 is lost: the router sends its packets elsewhere", func() error { return d.net.SpreadOver(lbs[0], lbs[2]) }},
		replace(2),
		{"lb-1's agent is killed with -9, and starts again", func() error {
			lbs[0].AgentProcess().Kill()
			return lbs[0].StartAgent(d.Binary)
		}},
		replace(3),
		{"lb-2 is back, with nothing that it knew", func() error {
			lbs[1].AgentProcess().Kill()
			if _, err := lbs[1].Run(d.Binary, "cleanup"); err != nil {
				return err
			}
			if err := lbs[1].StartAgent(d.Binary); err != nil {
				return err
			}
			if err := d.net.WaitProgrammed(len(before)+3, 30*time.Second); err != nil {
				return err
			}
			return d.net.SpreadOver(lbs...)
		}},
		replace(4),
	}
}

// serveTalks starts a server in every Pod that says its name to each line.
func (d *Demo) serveTalks() (stop func(), err error) {
	var listeners []net.Listener
	stop = func() {
		for _, l := range listeners {
			l.Close()
		}
	}
	for _, pod := range d.net.AllPods() {
		var l net.Listener
		if err := pod.Do(func() (err error) {
			l, err = net.Listen("tcp", fmt.Sprintf(":%d", talkPort))
			return err
		}); err != nil {
			stop()
			return nil, fmt.Errorf("serve in %s: %w", pod.Label, err)
		}
		listeners = append(listeners, l)
		go serveTalk(l, pod.Label)
	}
	return stop, nil
}

func serveTalk(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for lines := bufio.NewScanner(c); lines.Scan(); {
				if _, err := fmt.Fprintf(c, "%s %s\n", name, lines.Text()); err != nil {
					return
				}
			}
		}()
	}
}

// converse opens the connections, of both families in turn.
func (d *Demo) converse() (all []*conversation, err error) {
	for i := range conversations {
		c := &conversation{vip: netip.AddrPortFrom(vips[i%2], talkPort)}
		err := d.net.Client.Do(func() (err error) {
			c.connection, err = (&net.Dialer{Timeout: patience}).Dial("tcp", c.vip.String())
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("open connection %d: %w", i, err)
		}
		c.client = netip.MustParseAddrPort(c.connection.LocalAddr().String())
		reader := bufio.NewReader(c.connection)
		if c.pod, err = c.say(reader, 0); err != nil {
			return nil, fmt.Errorf("connection %d: %w", i, err)
		}
		all = append(all, c)
	}
	return all, nil
}

// say says one thing, and returns who answered.
func (c *conversation) say(reader *bufio.Reader, n int) (string, error) {
	if err := c.connection.SetDeadline(time.Now().Add(talkPatience)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c.connection, "%d\n", n); err != nil {
		return "", err
	}
	line, err := reader.ReadString('\n')
	pod, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	if err == nil && rest != fmt.Sprint(n) {
		err = fmt.Errorf("answered %q", line)
	}
	return pod, err
}

func (c *conversation) talk(ctx context.Context) {
	defer c.connection.Close()
	reader := bufio.NewReader(c.connection)
	for n := 1; ctx.Err() == nil; n++ {
		began := time.Now()
		pod, err := c.say(reader, n)
		if err == nil && pod != c.pod {
			err = fmt.Errorf("moved from %s to %s", c.pod, pod)
		}
		c.mu.Lock()
		c.said++
		c.longest = max(c.longest, time.Since(began))
		c.broken = err
		c.mu.Unlock()
		if err != nil || !sleepFor(ctx, talkBeat) {
			return
		}
	}
}

// state is how many conversations are broken, what was said, and the longest
// that an answer took.
func state(all []*conversation) (broken, said int, longest time.Duration, example error) {
	for _, c := range all {
		c.mu.Lock()
		if c.broken != nil {
			broken, example = broken+1, c.broken
		}
		said, longest = said+c.said, max(longest, c.longest)
		c.mu.Unlock()
	}
	return broken, said, longest, example
}

func (d *Demo) progress(step int, text string, all []*conversation, others *others) {
	if step == 0 {
		d.say("\n%-56s %8s %10s %10s", "", "broken", "pure hash", "per node")
	}
	broken, _, _, _ := state(all)
	d.say("%-56s %8d %10d %10d", text, broken, len(others.hash), len(others.table))
}

func (d *Demo) concludeRollout(all []*conversation, others *others, started time.Time) error {
	broken, said, longest, example := state(all)
	d.say("")
	var wrong []error
	claim := func(holds bool, format string, args ...any) {
		mark := "ok   "
		if !holds {
			mark = "WRONG"
			wrong = append(wrong, fmt.Errorf(format, args...))
		}
		d.say("%s %s", mark, fmt.Sprintf(format, args...))
	}
	claim(broken == 0, "%d of %d connections broken, after %d messages", broken, len(all), said)
	claim(longest < talkStall, "the longest that any answer took: %d ms", longest.Milliseconds())
	claim(len(others.hash) > 0, "a pure hash would have broken %d", len(others.hash))
	claim(len(others.table) > 0, "a table of flows on each LB node would have broken %d", len(others.table))
	if example != nil {
		d.say("one that broke: %v", example)
	}
	if err := errors.Join(wrong...); err != nil {
		return fmt.Errorf("not as claimed: %w", err)
	}
	d.say("rollout: %d of %d connections broken; a pure hash would have broken %d, a table of flows on each LB node %d; %.1f s",
		broken, len(all), len(others.hash), len(others.table), time.Since(started).Seconds())
	return nil
}
