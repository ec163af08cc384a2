// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bytes"
	"container/heap"
	"slices"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

const (
	// So few new probes at once are soon done; more are spread over their
	// interval.
	fewNew    = 100
	soon      = time.Second
	leastWait = 10 * time.Millisecond // between two probes of a backend, whatever a Check says
	// A suspected backend is not probed again before a tenth of its interval,
	// nor before this.
	leastSuspectWait = 50 * time.Millisecond
)

// schedule says who is due when and what is thought of whom. It is pure: no
// clock, no sockets, no locks.
type schedule struct {
	targets map[lb.ProbeID]*target
	queue   queue[*target] // those that are not busy
	random  func() float64 // 0 <= random() < 1
}

// target is a backend that is probed.
type target struct {
	probe   lb.Probe
	verdict Verdict
	against int       // how many probes in a row contradicted verdict.Healthy
	started time.Time // when the last probe that has ended did
	next    item[*target]
	busy    bool // taken, and not yet ended
	again   bool // suspected while busy
	gone    bool // no longer wanted
}

// outcome is what became of one probe.
type outcome struct {
	target         *target
	started, ended time.Time
	problem        string // "": it succeeded
	// fault is why there was no probe at all: this node's fault, which says
	// nothing of the backend.
	fault error
}

func newSchedule(random func() float64) schedule {
	return schedule{targets: map[lb.ProbeID]*target{}, random: random}
}

// set makes the probes those that are wanted.
func (s *schedule) set(now time.Time, probes []lb.Probe) {
	wanted := make(map[lb.ProbeID]struct{}, len(probes))
	var added []*target
	for _, p := range probes {
		old := s.targets[p.ID]
		if p.Check.Kind == "" {
			continue
		}
		wanted[p.ID] = struct{}{}
		if old != nil && same(old.probe.Check, p.Check) {
			old.probe = p
			continue
		}
		if old != nil {
			s.drop(old)
		}
		t := &target{probe: p, verdict: Verdict{Healthy: true, Since: now}}
		s.targets[p.ID] = t
		added = append(added, t)
	}
	for id, t := range s.targets {
		if _, ok := wanted[id]; !ok {
			delete(s.targets, id)
			s.drop(t)
		}
	}
	for _, t := range added {
		if !t.gone { // as one that was named twice is
			s.put(t, first(now, interval(t.probe.Check), len(added) <= fewNew, s.random()))
		}
	}
}

// drop forgets a target that is no longer among the targets. One that is busy
// is left to who has it.
func (s *schedule) drop(t *target) {
	t.gone = true
	if t.next.queued {
		heap.Remove(&s.queue, t.next.index)
	}
}

func (s *schedule) put(t *target, at time.Time) {
	t.next.of, t.next.at = t, at
	heap.Push(&s.queue, &t.next)
}

// take returns the next that is due, which is busy from now on; nil: none is.
func (s *schedule) take(now time.Time) *target {
	if len(s.queue) == 0 || s.queue[0].at.After(now) {
		return nil
	}
	t := heap.Pop(&s.queue).(*item[*target]).of
	t.busy = true
	return t
}

// due returns when somebody is next due; never: the limit.
func (s *schedule) due(limit time.Time) time.Time {
	if len(s.queue) == 0 || s.queue[0].at.After(limit) {
		return limit
	}
	return s.queue[0].at
}

// finish takes in what became of a target that was taken, and says whether
// its Healthy changed.
func (s *schedule) finish(o outcome) bool {
	t := o.target
	t.busy, t.started = false, o.started
	if t.gone {
		return false
	}
	at := next(o.started, o.ended, interval(t.probe.Check), s.random())
	if t.again {
		t.again = false
		at = earlier(at, t.soonest(o.ended))
	}
	s.put(t, at)
	return o.fault == nil && t.judge(o)
}

// suspect makes a target due as soon as it may be.
func (s *schedule) suspect(now time.Time, id lb.ProbeID) {
	t := s.targets[id]
	if t == nil {
		return
	}
	if t.busy {
		t.again = true // what is under way may have begun before the suspicion
		return
	}
	t.next.at = earlier(t.next.at, t.soonest(now))
	heap.Fix(&s.queue, t.next.index)
}

func (s *schedule) verdicts() map[lb.ProbeID]Verdict {
	verdicts := make(map[lb.ProbeID]Verdict, len(s.targets))
	for id, t := range s.targets {
		verdicts[id] = t.verdict
	}
	return verdicts
}

// judge counts an outcome and says whether Healthy changed.
func (t *target) judge(o outcome) bool {
	v, failed := &t.verdict, o.problem != ""
	v.Known, v.Problem, v.Last, v.RTT = true, o.problem, o.ended, o.ended.Sub(o.started)
	v.Probes++
	if failed {
		v.Failures++
	}
	if failed != v.Healthy {
		t.against = 0
		return false
	}
	t.against++
	threshold := t.probe.Check.Rise
	if v.Healthy {
		threshold = t.probe.Check.Fall
	}
	if t.against < threshold {
		return false
	}
	t.against = 0
	v.Healthy, v.Since = !v.Healthy, o.ended
	v.Flaps++
	return true
}

// soonest returns when a suspected target may be probed.
func (t *target) soonest(now time.Time) time.Time {
	if t.started.IsZero() {
		return now
	}
	at := t.started.Add(max(interval(t.probe.Check)/10, leastSuspectWait))
	if at.Before(now) {
		return now
	}
	return at
}

// interval returns how often a check is done; a zero Interval gets a default.
func interval(c lb.Check) time.Duration {
	if c.Interval <= 0 {
		return 5 * time.Second
	}
	return max(c.Interval, leastWait)
}

// timeout returns how long a probe may take.
func timeout(c lb.Check) time.Duration {
	if c.Timeout <= 0 {
		return min(time.Second, interval(c))
	}
	return c.Timeout
}

// first returns when a new target is first probed.
func first(now time.Time, interval time.Duration, few bool, random float64) time.Time {
	if few {
		interval = min(interval, soon)
	}
	return now.Add(time.Duration(random * float64(interval)))
}

// next returns when a target is due after a probe: an interval after its
// start, 10% more or less; whole intervals that the probe outlasted are
// skipped.
func next(started, ended time.Time, interval time.Duration, random float64) time.Time {
	at := started.Add(time.Duration((0.9 + 0.2*random) * float64(interval)))
	if late := ended.Sub(at); late > 0 {
		at = at.Add((late + interval - 1) / interval * interval)
	}
	return at
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// same says whether two checks are the same in every respect.
func same(a, b lb.Check) bool {
	return a.Kind == b.Kind && a.Port == b.Port && a.Path == b.Path && a.Host == b.Host &&
		a.GRPCService == b.GRPCService && a.Interval == b.Interval && a.Timeout == b.Timeout &&
		a.Rise == b.Rise && a.Fall == b.Fall && a.Probers == b.Probers && a.Reset == b.Reset && slices.Equal(a.Codes, b.Codes) &&
		bytes.Equal(a.Send, b.Send) && bytes.Equal(a.Expect, b.Expect)
}
