// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/peer"
	"fairlead.dev/fairlead/internal/run"
)

// recordsAgain is how often all records are told again, for nodes that were
// away.
const recordsAgain = 10 * time.Second

// peerServer answers LB nodes that ask or tell. A port that is taken stops
// nothing else: it is tried again.
func (a *Agent) peerServer(identity *peer.Identity) run.Task {
	loop := run.Loop{Trigger: run.NewTrigger(), Backoff: backoff, MaxBackoff: maxBackoff, Work: func(ctx context.Context) error {
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", a.config.Peers.Port))
		if err == nil {
			err = peer.Serve(ctx, listener, identity, peerNode{a})
		} else {
			err = fmt.Errorf("peers.port: %w; free it, or choose another, the same on all nodes", err)
		}
		if err != nil && ctx.Err() == nil {
			a.log.Error("peers are not answered", "error", err)
		}
		return err
	}}
	return run.Task{Name: "peers", Run: loop.Run}
}

// peerNode is the agent as its peers see it.
type peerNode struct{ agent *Agent }

// MayAsk: the LB nodes of the shard, and nobody else.
func (p peerNode) MayAsk(node string) bool {
	p.agent.mu.Lock()
	defer p.agent.mu.Unlock()
	return slices.ContainsFunc(p.agent.plan.LBNodes, func(n lb.LBNode) bool { return n.Node == node }) ||
		slices.ContainsFunc(p.agent.plan.Peers, func(n lb.Peer) bool { return n.Node == node })
}

func (p peerNode) dataplane() (*dataplane.Dataplane, error) {
	p.agent.mu.Lock()
	defer p.agent.mu.Unlock()
	if p.agent.dataplane == nil {
		return nil, dataplane.ErrNotLoaded
	}
	return p.agent.dataplane, nil
}

// Census answers what this node's Pods own.
func (p peerNode) Census(questions []peer.Question) ([][]peer.Answer, error) {
	d, err := p.dataplane()
	if err != nil {
		return nil, err
	}
	return answerCensus(d, questions)
}

// Record takes in what another LB node recorded.
func (p peerNode) Record(records []peer.Record) error {
	d, err := p.dataplane()
	if err != nil {
		return err
	}
	noted := make([]dataplane.Record, len(records))
	for i, r := range records {
		noted[i] = dataplane.Record{Hash: r.Hash, Target: r.Target}
	}
	return d.Record(noted)
}

// tellRecords tells the other LB nodes what was recorded since they were told
// last; everything again every so often, for nodes that were away.
func (a *Agent) tellRecords(ctx context.Context, d *dataplane.Dataplane, plan lb.Plan) {
	if len(plan.Peers) == 0 || !d.Recording() {
		clear(a.told)
		return
	}
	if time.Since(a.toldAll) >= recordsAgain {
		clear(a.told)
		a.toldAll = time.Now()
	}
	records, err := d.Records()
	if err != nil {
		a.log.Error("read what was recorded", "error", err)
		return
	}
	var fresh []peer.Record
	for _, r := range records {
		if a.told[r.Hash] != r.Target {
			a.told[r.Hash] = r.Target
			fresh = append(fresh, peer.Record{Hash: r.Hash, Target: r.Target})
		}
	}
	if len(fresh) == 0 {
		return
	}
	a.tellPeers(ctx, plan, func(ctx context.Context, node string, at netip.AddrPort) error {
		return a.census.client.Tell(ctx, node, at, fresh)
	})
}

// tellPeers tells every other LB node something that is told again later, so a
// node that is not reached is no error.
func (a *Agent) tellPeers(ctx context.Context, plan lb.Plan, tell func(ctx context.Context, node string, at netip.AddrPort) error) {
	run.Each(len(plan.Peers), censusParallel, func(i int) {
		ctx, cancel := context.WithTimeout(ctx, censusPatience)
		defer cancel()
		other := plan.Peers[i]
		if err := tell(ctx, other.Node, netip.AddrPortFrom(other.Address, a.config.Peers.Port)); err != nil {
			a.log.Debug("another LB node was not told", "error", err)
		}
	})
}
