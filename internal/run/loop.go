// SPDX-License-Identifier: Apache-2.0

package run

import (
	"context"
	"time"
)

// Trigger says "something changed". Any number of calls of Fire before the
// next run make one run.
type Trigger struct{ pending chan struct{} }

// NewTrigger returns a Trigger that has not fired.
func NewTrigger() *Trigger { return &Trigger{pending: make(chan struct{}, 1)} }

// Fire asks for a run. It never blocks.
func (t *Trigger) Fire() {
	select {
	case t.pending <- struct{}{}:
	default:
	}
}

// Loop is work that is done again whenever something changed.
type Loop struct {
	Trigger *Trigger
	// Spacing is the least time between the starts of two runs. A Trigger that
	// fires after a longer pause is served at once.
	Spacing time.Duration
	// Resync is the longest time without a run; 0: no limit.
	Resync time.Duration
	// After an error, the work is done again after Backoff, which doubles with
	// each further error up to MaxBackoff. A Trigger does not wait for it, since
	// what changed may be the remedy, but does not end it either.
	Backoff, MaxBackoff time.Duration
	Work                func(ctx context.Context) error
}

// Run works once at the start and then after each Fire, until the context
// ends. Errors of the work end nothing: the work reports them itself.
func (l Loop) Run(ctx context.Context) error {
	backoff := l.Backoff
	for {
		started := time.Now()
		wait := l.Resync
		if err := l.Work(ctx); err != nil {
			wait = backoff
			backoff = min(2*backoff, l.MaxBackoff)
		} else {
			backoff = l.Backoff
		}
		if !l.await(ctx, wait) || !sleep(ctx, l.Spacing-time.Since(started)) {
			return ctx.Err()
		}
		// What fired during the wait is served by the run that follows.
		select {
		case <-l.Trigger.pending:
		default:
		}
	}
}

// await returns when the trigger fired or the time (0: none) is over, and
// false when the context has ended.
func (l Loop) await(ctx context.Context, limit time.Duration) bool {
	var over <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-l.Trigger.pending:
	case <-over:
	}
	return ctx.Err() == nil
}

// sleep returns false when the context has ended.
func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
