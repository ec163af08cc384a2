// SPDX-License-Identifier: Apache-2.0

// Package health probes backends and reports which of them may take new
// connections.
package health

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"fairlead.dev/fairlead/internal/lb"
	"fairlead.dev/fairlead/internal/run"
)

const (
	spacing = 10 * time.Millisecond // of calls of changed
	// What is due within this is done together: 2,000 probes a second are
	// 200 turns of the loop, not 2,000.
	quantum = 5 * time.Millisecond
	batch   = 64  // probes that start before it is looked who answered
	workers = 256 // probes at once that need more than a raw socket
)

// Verdict is what probes say of one backend.
type Verdict struct {
	// Healthy is true until Fall probes in a row failed: a new backend starts
	// healthy, since checks can be wrong, and readiness said yes.
	Healthy bool
	Known   bool      // any probe has ended
	Since   time.Time // when Healthy last changed
	Problem string    // why the last probe failed, in one line; "" when it did not
	Last    time.Time // when the last probe ended
	RTT     time.Duration

	Probes, Failures uint64
	Flaps            uint64 // how often Healthy changed
}

// Prober probes backends. It is safe for concurrent use.
type Prober struct {
	bind    func(p lb.Probe, fd int) error
	changed func()
	log     *slog.Logger
	roots   *x509.CertPool // whom certificates must be from; nil: the system's

	flipped atomic.Bool // a Healthy changed since changed was called
	report  *run.Trigger
	lines   limiter // of the log

	mu       sync.Mutex
	schedule schedule
	sockets  []*target  // due, for the poller
	requests []*target  // due, for the workers
	work     *sync.Cond // there are requests, or no more will come
	poller   *poller    // nil: not running
	until    time.Time  // when somebody was next due as the poller last looked
}

// New returns a Prober. It calls bind with each new socket of a Tunneled probe
// before that is connected, and changed, without locks held, after the Healthy
// of any backend changed. bind may be nil.
func New(bind func(p lb.Probe, fd int) error, changed func(), log *slog.Logger) *Prober {
	p := &Prober{bind: bind, changed: changed, log: log, report: run.NewTrigger(), schedule: newSchedule(rand.Float64)}
	p.work = sync.NewCond(&p.mu)
	return p
}

// Set makes these the backends that are probed. The verdicts of those whose ID
// and Check stay are kept.
func (p *Prober) Set(probes []lb.Probe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.schedule.set(time.Now(), probes)
	p.hurry()
}

// Suspect has backends probed at once, or as soon as the limit on that allows:
// a tenth of the interval after their last probe, and at least 50 ms.
func (p *Prober) Suspect(ids ...lb.ProbeID) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	for _, id := range ids {
		p.schedule.suspect(now, id)
	}
	p.hurry()
}

// Verdicts returns what is thought of each backend.
func (p *Prober) Verdicts() map[lb.ProbeID]Verdict {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.schedule.verdicts()
}

// hurry wakes the poller when somebody is due earlier than it knows.
func (p *Prober) hurry() {
	if p.poller != nil && p.schedule.due(p.until).Before(p.until) {
		p.until = time.Time{} // once is enough
		p.poller.wake()
	}
}

// Run probes until ctx ends. It can be called once.
func (p *Prober) Run(ctx context.Context) error {
	poller, err := newPoller(p.bind)
	if err != nil {
		return err
	}
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.poller = nil
		poller.close()
	}()
	p.mu.Lock()
	p.poller = poller
	p.mu.Unlock()
	report := run.Loop{Trigger: p.report, Spacing: spacing, Work: func(context.Context) error {
		if p.flipped.Swap(false) {
			p.changed()
		}
		return nil
	}}
	tasks := []run.Task{
		{Name: "probe with sockets", Run: func(ctx context.Context) error { return p.poll(ctx, poller) }},
		{Name: "report changed health", Run: report.Run},
		{Name: "stop probes", Run: func(ctx context.Context) error {
			<-ctx.Done()
			p.mu.Lock()
			defer p.mu.Unlock()
			poller.wake()
			p.work.Broadcast()
			return nil
		}},
	}
	for range workers {
		tasks = append(tasks, run.Task{Name: "probe with requests", Run: p.serve})
	}
	return run.All(ctx, tasks...)
}

// poll hands out what is due, and does what the poller can do.
func (p *Prober) poll(ctx context.Context, poller *poller) error {
	var starting []lb.Probe
	for ctx.Err() == nil {
		now := time.Now()
		due, until := p.due(now, min(batch, poller.room()), &starting)
		for i, t := range due {
			poller.start(t, starting[i])
		}
		outcomes, err := poller.wait(time.Now(), until)
		if err != nil {
			return err
		}
		p.finish(outcomes...)
	}
	return nil
}

// due returns up to limit of those that the poller is to start now, and in
// probes how; and when to look again.
func (p *Prober) due(now time.Time, limit int, probes *[]lb.Probe) (starting []*target, until time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for t := p.schedule.take(now); t != nil; t = p.schedule.take(now) {
		if k := t.probe.Check.Kind; k == lb.CheckTCP || k == lb.CheckUDP {
			p.sockets = append(p.sockets, t)
			continue
		}
		p.requests = append(p.requests, t)
		p.work.Signal()
	}
	*probes = (*probes)[:0]
	for len(p.sockets) > 0 && len(starting) < limit {
		t := p.sockets[0]
		p.sockets = p.sockets[1:]
		if !t.gone {
			starting, *probes = append(starting, t), append(*probes, t.probe)
		}
	}
	p.until = p.schedule.due(now.Add(time.Minute))
	until = p.until
	if soonest := now.Add(quantum); until.Before(soonest) {
		until = soonest
	}
	if len(p.sockets) > 0 && limit == batch {
		until = now
	}
	return starting, until
}

// serve does what the poller cannot.
func (p *Prober) serve(ctx context.Context) error {
	for {
		t, probe := p.request(ctx)
		if t == nil {
			return nil
		}
		started := time.Now()
		text, err := p.ask(ctx, probe)
		if ctx.Err() != nil {
			return nil
		}
		p.finish(outcome{target: t, started: started, ended: time.Now(), problem: text, fault: err})
	}
}

// request waits for something to do; nil: no more will come.
func (p *Prober) request(ctx context.Context) (*target, lb.Probe) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for len(p.requests) == 0 && ctx.Err() == nil {
			p.work.Wait()
		}
		if ctx.Err() != nil {
			return nil, lb.Probe{}
		}
		t := p.requests[0]
		p.requests = p.requests[1:]
		if !t.gone {
			return t, t.probe
		}
	}
}

// finish takes in what became of probes.
func (p *Prober) finish(outcomes ...outcome) {
	var said []func()
	flips := 0
	p.mu.Lock()
	for _, o := range outcomes {
		id := o.target.probe.ID
		flipped := p.schedule.finish(o)
		if flipped {
			flips++
		}
		switch {
		case o.fault != nil:
			said = append(said, func() { p.log.Warn("a backend could not be probed", "backend", id, "err", o.fault) })
		case flipped && o.problem != "":
			said = append(said, func() { p.log.Warn("a backend is unhealthy", "backend", id, "problem", o.problem) })
		case flipped:
			said = append(said, func() { p.log.Info("a backend is healthy", "backend", id) })
		}
	}
	p.hurry() // a worker's may be due before all others
	p.mu.Unlock()
	if flips > 0 {
		p.flipped.Store(true)
		p.report.Fire()
	}
	p.lines.say(p.log, said)
}

// limiter bounds how many lines a second are logged.
type limiter struct {
	mu             sync.Mutex
	second         time.Time
	count, dropped int
}

const linesPerSecond = 10

func (l *limiter) say(log *slog.Logger, said []func()) {
	if len(said) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); now.Sub(l.second) >= time.Second {
		if l.dropped > 0 {
			log.Warn(fmt.Sprintf("%d lines about the health of backends were left out", l.dropped))
		}
		l.second, l.count, l.dropped = now, 0, 0
	}
	for _, say := range said {
		if l.count++; l.count > linesPerSecond {
			l.dropped++
			continue
		}
		say()
	}
}
