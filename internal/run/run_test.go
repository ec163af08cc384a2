// SPDX-License-Identifier: Apache-2.0

package run

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func wait(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestAllStopsTheOthersAndNamesTheError(t *testing.T) {
	cause := errors.New("no such device")
	stopped := false
	err := All(t.Context(),
		Task{"watch links", func(context.Context) error { return cause }},
		Task{"serve status", func(ctx context.Context) error {
			err := wait(ctx)
			stopped = true
			return err
		}},
	)
	if !errors.Is(err, cause) || err.Error() != "watch links: no such device" {
		t.Errorf("got %q", err)
	}
	if !stopped {
		t.Error("the other task was not stopped before All returned")
	}
}

func TestAllStopsWhenATaskReturnsWithoutError(t *testing.T) {
	err := All(t.Context(),
		Task{"short", func(context.Context) error { return nil }},
		Task{"long", wait},
	)
	if err != nil {
		t.Errorf("got %v", err)
	}
}

func TestAllReportsThePanicOfATask(t *testing.T) {
	err := All(t.Context(),
		Task{"faulty", func(context.Context) error { panic("index out of range") }},
		Task{"long", wait},
	)
	if err == nil || !strings.HasPrefix(err.Error(), "faulty: panic: index out of range") {
		t.Errorf("got %v", err)
	}
}

func TestAllJoinsErrorsAfterTheEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := All(ctx,
		Task{"clean", wait},
		Task{"one", func(ctx context.Context) error { _ = wait(ctx); return errors.New("close socket") }},
		Task{"two", func(ctx context.Context) error { _ = wait(ctx); return errors.New("flush log") }},
	)
	if err == nil || !strings.Contains(err.Error(), "one: close socket") ||
		!strings.Contains(err.Error(), "two: flush log") || strings.Contains(err.Error(), "clean") {
		t.Errorf("got %v", err)
	}
}

// bench runs a loop in virtual time; script fires and returns when it is over.
// It returns when each run started, since the beginning.
func bench(t *testing.T, l Loop, work func(n int) error, script func(fire func())) []time.Duration {
	var runs []time.Duration
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		ctx, cancel := context.WithCancel(t.Context())
		l.Trigger = NewTrigger()
		l.Work = func(context.Context) error {
			runs = append(runs, time.Since(begin))
			return work(len(runs))
		}
		err := All(ctx,
			Task{"loop", l.Run},
			Task{"script", func(context.Context) error {
				synctest.Wait()
				script(l.Trigger.Fire)
				cancel()
				return nil
			}},
		)
		if err != nil {
			t.Error(err)
		}
	})
	return runs
}

func expect(t *testing.T, got []time.Duration, want ...time.Duration) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("ran at %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Fatalf("ran at %v, want %v", got, want)
		}
	}
}

func ok(int) error { return nil }

func TestLoopCoalescesAndKeepsItsSpacing(t *testing.T) {
	got := bench(t, Loop{Spacing: 10 * time.Millisecond}, ok, func(fire func()) {
		for range 100 { // within the spacing of the first run: one run
			fire()
		}
		time.Sleep(time.Second)
		fire() // after a pause: at once
		time.Sleep(time.Millisecond)
		fire() // 1 ms later: when the spacing allows
		time.Sleep(time.Second)
	})
	expect(t, got, 0, 10*time.Millisecond, time.Second, 1010*time.Millisecond)
}

func TestLoopRunsAgainForWhatFiredDuringARun(t *testing.T) {
	got := bench(t, Loop{}, func(n int) error {
		time.Sleep(50 * time.Millisecond)
		return nil
	}, func(fire func()) {
		time.Sleep(20 * time.Millisecond)
		fire()
		time.Sleep(time.Second)
	})
	expect(t, got, 0, 50*time.Millisecond)
}

func TestLoopResyncs(t *testing.T) {
	got := bench(t, Loop{Resync: 30 * time.Second}, ok, func(func()) {
		time.Sleep(70 * time.Second)
	})
	expect(t, got, 0, 30*time.Second, 60*time.Second)
}

func TestLoopBacksOffAndRecovers(t *testing.T) {
	l := Loop{Resync: time.Minute, Backoff: time.Second, MaxBackoff: 4 * time.Second}
	got := bench(t, l, func(n int) error {
		if n <= 4 || n == 6 {
			return errors.New("no memory")
		}
		return nil
	}, func(fire func()) {
		time.Sleep(20 * time.Second)
		fire() // fails, and the backoff is short again
		time.Sleep(2 * time.Second)
	})
	// Errors at 0, 1, 3, 7 s; success at 11 s.
	expect(t, got, 0, time.Second, 3*time.Second, 7*time.Second, 11*time.Second,
		20*time.Second, 21*time.Second)
}

func TestLoopServesATriggerDuringBackoff(t *testing.T) {
	l := Loop{Backoff: time.Minute, MaxBackoff: time.Minute}
	got := bench(t, l, func(n int) error {
		if n == 1 {
			return errors.New("bad file")
		}
		return nil
	}, func(fire func()) {
		time.Sleep(time.Second)
		fire()
		time.Sleep(2 * time.Minute)
	})
	expect(t, got, 0, time.Second)
}
