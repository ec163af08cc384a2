// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/peer"
	"fairlead.dev/fairlead/internal/run"
	"fairlead.dev/fairlead/internal/slots"
)

// When a census is taken of a frontend.
const (
	censusTick     = 250 * time.Millisecond
	censusEarly    = 2 * time.Second                                          // after a change
	censusSettled  = slots.Settle + dataplane.OwnedAge + 100*time.Millisecond // ends what the change began
	censusSteady   = 30 * time.Second                                         // while slots are contested
	censusUnknown  = time.Second                                              // while a backend has never answered
	censusDenied   = 5 * time.Second                                          // at most, when flows are denied where nobody expects it
	censusDraining = 5 * time.Second                                          // to tell how many connections are left
	censusStart    = 10 * time.Second                                         // that a node which starts waits at most
	censusPatience = 2 * time.Second                                          // with one node
	censusExpire   = 5 * time.Second                                          // contests that nobody can be asked about are looked at so often
	inquiryMost    = 2000                                                     // questions in one request
	censusParallel = 16                                                       // nodes asked at a time
)

// census asks the agents of backends' nodes which flows their backends own.
type census struct {
	client *peer.Client
	port   uint16
	last   map[lb.FrontendID]time.Time // asked
	failed map[string]error            // by node, of the last time

	mu    sync.Mutex
	flows map[lb.FrontendID]map[lb.BackendID]uint32 // that each had, when it last answered
}

func newCensus(identity *peer.Identity, port uint16) *census {
	return &census{client: peer.NewClient(identity), port: port, last: map[lb.FrontendID]time.Time{}, failed: map[string]error{},
		flows: map[lb.FrontendID]map[lb.BackendID]uint32{}}
}

// due says whether a frontend should be asked about now.
func (c *census) due(contest dataplane.Contest, draining bool, now time.Time) bool {
	last := c.last[contest.ID]
	since := now.Sub(last)
	switch {
	case last.IsZero() || contest.Unknown && since >= censusUnknown:
		return true
	case contest.Denied && since >= censusDenied, draining && since >= censusDraining:
		return true
	case contest.Contested == 0:
		return false
	}
	for _, after := range []time.Duration{censusEarly, censusSettled} {
		if at := contest.Changed.Add(after); last.Before(at) && !now.Before(at) {
			return true
		}
	}
	return since >= censusSteady-rand.N(censusSteady/10) // so that nodes do not ask in step
}

// inquiry is what one node is asked, and who the targets are to us.
type inquiry struct {
	node      string
	at        netip.AddrPort // zero: this node itself
	questions []peer.Question
	frontends []lb.FrontendID
	backends  [][]lb.BackendID
}

// inquiries groups by node what there is to ask about frontends, in pieces that
// one request can hold.
func (c *census) inquiries(plan lb.Plan, sizes map[lb.FrontendID]int) []*inquiry {
	var all []*inquiry
	open := map[string]*inquiry{}
	for _, f := range plan.Frontends {
		size, ok := sizes[f.ID]
		if !ok || f.Mode.Held() || f.Mode == lb.ModeNAT {
			continue
		}
		asked := map[string]bool{}
		for _, b := range f.Backends {
			if b.Node == "" {
				continue
			}
			i := open[b.Node]
			if i == nil || !asked[b.Node] && len(i.questions) >= inquiryMost {
				i = &inquiry{node: b.Node}
				if b.ID.Mode != lb.ModeLocal {
					i.at = netip.AddrPortFrom(b.ID.Tunnel, c.port)
				}
				open[b.Node], all = i, append(all, i)
			}
			if !asked[b.Node] {
				asked[b.Node] = true
				i.begin(f, size)
			}
			at := len(i.questions) - 1
			i.questions[at].Targets = append(i.questions[at].Targets, b.ID.Target)
			i.backends[at] = append(i.backends[at], b.ID)
		}
	}
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all
}

// begin adds a question about a frontend of so many slots.
func (i *inquiry) begin(f lb.Frontend, size int) {
	width := uint8(min(max(bits.Len(uint(size))-1, peer.MinBits), peer.MaxBits))
	i.questions = append(i.questions, peer.Question{Frontend: netip.AddrPortFrom(f.ID.VIP, f.ID.Port), Protocol: f.ID.Protocol, Bits: width})
	i.frontends, i.backends = append(i.frontends, f.ID), append(i.backends, nil)
}

// take asks all nodes, a few at a time, and returns what they said.
func (c *census) take(ctx context.Context, d *dataplane.Dataplane, all []*inquiry, log *slog.Logger) dataplane.Answers {
	answers := dataplane.Answers{}
	run.Each(len(all), censusParallel, func(i int) {
		asked := time.Now()
		replies, err := c.ask(ctx, d, all[i])
		c.mu.Lock()
		defer c.mu.Unlock()
		c.note(all[i].node, err, log)
		if err != nil {
			return
		}
		for q, of := range replies {
			id := all[i].frontends[q]
			if answers[id] == nil {
				answers[id] = map[lb.BackendID]slots.Answer{}
			}
			if c.flows[id] == nil {
				c.flows[id] = map[lb.BackendID]uint32{}
			}
			for t, reply := range of {
				backend := all[i].backends[q][t]
				answers[id][backend] = slots.Answer{Asked: asked.Add(-dataplane.OwnedAge), Owns: reply.Owns}
				c.flows[id][backend] = reply.Flows
			}
		}
	})
	return answers
}

// flowsOf returns how many flows a backend of a frontend had when its node last
// answered; nil: it never did.
func (c *census) flowsOf(f lb.FrontendID, b lb.BackendID) *uint32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	if flows, ok := c.flows[f][b]; ok {
		return &flows
	}
	return nil
}

func (c *census) ask(ctx context.Context, d *dataplane.Dataplane, i *inquiry) ([][]peer.Answer, error) {
	if !i.at.IsValid() {
		return answerCensus(d, i.questions)
	}
	ctx, cancel := context.WithTimeout(ctx, censusPatience)
	defer cancel()
	return c.client.Ask(ctx, i.node, i.at, i.questions)
}

// note logs when a node stops or begins to answer.
func (c *census) note(node string, err error, log *slog.Logger) {
	before := c.failed[node]
	switch {
	case err != nil && before == nil:
		log.Warn("a node does not say which flows its backends own; what is known stays", "node", node, "error", err)
	case err == nil && before != nil:
		log.Info("a node says again which flows its backends own", "node", node)
	}
	c.failed[node] = err
}

// answerCensus is the other side: what this node's Pods own.
func answerCensus(d *dataplane.Dataplane, questions []peer.Question) ([][]peer.Answer, error) {
	owned, err := d.Owned()
	if err != nil {
		return nil, fmt.Errorf("read flows: %w", err)
	}
	answers := make([][]peer.Answer, len(questions))
	for i, q := range questions {
		answers[i] = make([]peer.Answer, len(q.Targets))
		for j, target := range q.Targets {
			answers[i][j].Flows, answers[i][j].Owns = owned.Slots(q.Frontend, q.Protocol, target, q.Bits)
		}
	}
	return answers, nil
}

// watchCensus takes a census of what is due, again and again.
func (a *Agent) watchCensus(ctx context.Context) error {
	ticker := time.NewTicker(censusTick)
	defer ticker.Stop()
	var expired time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		a.mu.Lock()
		d, plan, attached := a.dataplane, withDrains(a.plan, a.byHand), !a.programmed.IsZero()
		if !a.drainBy.IsZero() && !time.Now().Before(a.drainBy) {
			a.drainBy = time.Time{}
			a.trigger.Fire()
		}
		a.mu.Unlock()
		if d == nil || !attached || !plan.LoadBalancer {
			continue
		}
		if a.census != nil {
			a.takeCensus(ctx, d, plan)
			a.tellRecords(ctx, d, plan)
			a.tellVerdicts(ctx, plan)
		}
		a.suspectUnreachable(d, plan)
		if time.Since(expired) >= censusExpire {
			expired = time.Now()
			if err := errors.Join(d.NATCensus(), d.Expire()); err != nil {
				a.log.Error("end contests", "error", err)
			}
		}
	}
}

// takeCensus takes a census of the frontends that are due.
func (a *Agent) takeCensus(ctx context.Context, d *dataplane.Dataplane, plan lb.Plan) {
	now, sizes, draining := time.Now(), map[lb.FrontendID]int{}, map[lb.FrontendID]bool{}
	for _, f := range plan.Frontends {
		draining[f.ID] = slices.ContainsFunc(f.Backends, func(b lb.Backend) bool { return b.State != lb.Active })
	}
	for _, contest := range d.Contests() {
		if a.census.due(contest, draining[contest.ID], now) {
			sizes[contest.ID] = contest.Slots
			a.census.last[contest.ID] = now
		}
	}
	if len(sizes) == 0 {
		return
	}
	a.census.forget(plan)
	answers := a.census.take(ctx, d, a.census.inquiries(plan, sizes), a.log)
	if err := d.Census(answers); err != nil {
		a.log.Error("take in the census", "error", err)
	}
}

// forget drops what is known of nodes and backends that are not there any more.
func (c *census) forget(plan lb.Plan) {
	nodes := map[string]bool{}
	for _, p := range plan.Peers {
		nodes[p.Node] = true
	}
	kept := map[lb.FrontendID]map[lb.BackendID]uint32{}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range plan.Frontends {
		kept[f.ID] = map[lb.BackendID]uint32{}
		for _, b := range f.Backends {
			nodes[b.Node] = true
			if flows, ok := c.flows[f.ID][b.ID]; ok {
				kept[f.ID][b.ID] = flows
			}
		}
	}
	c.flows = kept
	maps.DeleteFunc(c.last, func(id lb.FrontendID, _ time.Time) bool { return kept[id] == nil })
	maps.DeleteFunc(c.failed, func(node string, _ error) bool { return !nodes[node] })
	c.client.Keep(nodes)
}

// firstCensus asks until all backends' nodes have answered or time is up, so
// that a node that starts knows who owns what before it forwards.
func (a *Agent) firstCensus(ctx context.Context, d *dataplane.Dataplane, plan lb.Plan) {
	deadline := time.Now().Add(censusStart)
	for ctx.Err() == nil {
		clear(a.census.last)
		a.takeCensus(ctx, d, plan)
		unknown := 0
		for _, contest := range d.Contests() {
			if contest.Unknown {
				unknown++
			}
		}
		if unknown == 0 {
			return
		}
		if time.Now().After(deadline) {
			a.log.Warn("not all backends' nodes said which flows they have: they are asked about everything until they do", "frontends", unknown)
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(censusTick):
		}
	}
}
