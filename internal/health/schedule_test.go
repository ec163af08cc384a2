// SPDX-License-Identifier: Apache-2.0

package health

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/lb"
)

var epoch = time.Unix(1_000_000_000, 0)

func idOf(n int) lb.ProbeID {
	target := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)}), 80)
	return lb.ProbeID{Service: lb.ServiceID{Namespace: "default", Name: "web"}, Target: target, Protocol: lb.TCP}
}

func probesOf(n int, c lb.Check) []lb.Probe {
	probes := make([]lb.Probe, n)
	for i := range probes {
		probes[i] = lb.Probe{ID: idOf(i), Check: c}
	}
	return probes
}

var check = lb.Check{Kind: lb.CheckTCP, Interval: 10 * time.Second, Timeout: time.Second, Rise: 2, Fall: 3}

// finish ends a probe that began at a time and took 1 ms.
func finish(s *schedule, t *target, at time.Time, problem string) bool {
	return s.finish(outcome{target: t, started: at, ended: at.Add(time.Millisecond), problem: problem})
}

func TestThresholds(t *testing.T) {
	s := newSchedule(func() float64 { return 0.5 })
	s.set(epoch, probesOf(1, check))
	at, got := epoch, ""
	for _, result := range "+--+---+-++--+++---+" {
		at = at.Add(20 * time.Second)
		problem := ""
		if result == '-' {
			problem = "refused"
		}
		flipped := finish(&s, s.take(at), at, problem)
		letter := map[bool]string{true: "u", false: "d"}[s.targets[idOf(0)].verdict.Healthy]
		if flipped {
			letter = map[string]string{"u": "U", "d": "D"}[letter]
		}
		got += letter
	}
	// Capitals are changes. Only probes in a row count.
	if want := "uuuuuuDdddUuuuuuuuDd"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	v := s.targets[idOf(0)].verdict
	want := Verdict{Known: true, Since: epoch.Add(19*20*time.Second + time.Millisecond), Last: at.Add(time.Millisecond),
		RTT: time.Millisecond, Probes: 20, Failures: 11, Flaps: 3}
	if v != want {
		t.Errorf("got  %+v\nwant %+v", v, want)
	}
}

func TestFaultsOfThisNodeSayNothingOfABackend(t *testing.T) {
	s := newSchedule(func() float64 { return 0.5 })
	s.set(epoch, probesOf(1, check))
	before := s.targets[idOf(0)].verdict
	for i := range 10 {
		at := epoch.Add(time.Duration(i+1) * time.Minute)
		s.finish(outcome{target: s.take(at), started: at, ended: at, fault: errors.New("no descriptors")})
	}
	if v := s.targets[idOf(0)].verdict; v != before {
		t.Errorf("got %+v", v)
	}
}

func TestWhenProbesAreDue(t *testing.T) {
	after := func(d time.Duration) time.Time { return epoch.Add(d) }
	for _, c := range []struct {
		name      string
		got, want time.Time
	}{
		{"first of few", first(epoch, 10*time.Second, true, 0.5), after(500 * time.Millisecond)},
		{"first of few, short interval", first(epoch, 100*time.Millisecond, true, 0.5), after(50 * time.Millisecond)},
		{"first of many", first(epoch, 10*time.Second, false, 0.5), after(5 * time.Second)},
		{"next, least", next(epoch, after(time.Millisecond), 10*time.Second, 0), after(9 * time.Second)},
		{"next, middle", next(epoch, after(time.Millisecond), 10*time.Second, 0.5), after(10 * time.Second)},
		{"next, just missed", next(epoch, after(10*time.Second+1), 10*time.Second, 0.5), after(20 * time.Second)},
		{"next, exactly at the end", next(epoch, after(10*time.Second), 10*time.Second, 0.5), after(10 * time.Second)},
		{"next, two skipped", next(epoch, after(25*time.Second), 10*time.Second, 0.5), after(30 * time.Second)},
	} {
		if !c.got.Equal(c.want) {
			t.Errorf("%s: got %s, want %s", c.name, c.got.Sub(epoch), c.want.Sub(epoch))
		}
	}
}

func TestManyNewProbesAreSpreadOverTheInterval(t *testing.T) {
	n := 0
	s := newSchedule(func() float64 { n++; return float64(n%1000) / 1000 })
	s.set(epoch, probesOf(1000, check))
	for second := 1; second <= 10; second++ {
		due := 0
		for s.take(epoch.Add(time.Duration(second)*time.Second-1)) != nil {
			due++
		}
		if due != 100 {
			t.Errorf("%d are due in second %d, want 100", due, second)
		}
	}
}

func TestSuspectsAreProbedSoonButNotTooOften(t *testing.T) {
	s := newSchedule(func() float64 { return 0.9 })
	s.set(epoch, probesOf(1, check))
	id := idOf(0)
	s.suspect(epoch, idOf(77)) // nobody
	s.suspect(epoch, id)
	took := s.take(epoch)
	if took == nil {
		t.Fatal("a suspect that was never probed is not due at once")
	}
	s.suspect(epoch, id) // while it is being probed: once more after that
	finish(&s, took, epoch, "")
	if at := s.due(epoch.Add(time.Hour)); at != epoch.Add(time.Second) {
		t.Errorf("the suspect is due after %s, want a tenth of the interval", at.Sub(epoch))
	}
	took = s.take(epoch.Add(time.Second))
	finish(&s, took, epoch.Add(time.Second), "")
	s.suspect(epoch.Add(5*time.Second), id)
	if at := s.due(epoch.Add(time.Hour)); at != epoch.Add(5*time.Second) {
		t.Errorf("the suspect is due after %s, want at once", at.Sub(epoch))
	}
	short := check
	short.Interval = 200 * time.Millisecond
	s.set(epoch, probesOf(1, short))
	finish(&s, s.take(epoch.Add(time.Second)), epoch.Add(time.Second), "")
	s.suspect(epoch.Add(time.Second), id)
	if at := s.due(epoch.Add(time.Hour)); at != epoch.Add(time.Second+50*time.Millisecond) {
		t.Errorf("the suspect is due after %s, want 50 ms after its probe", at.Sub(epoch))
	}
}

func TestSetKeepsWhatStaysAndDropsWhatIsGone(t *testing.T) {
	s := newSchedule(func() float64 { return 0 })
	s.set(epoch, probesOf(4, check))
	for tt := s.take(epoch); tt != nil; tt = s.take(epoch) {
		finish(&s, tt, epoch, "refused")
	}
	probes := probesOf(3, check)
	probes[0].Via.UID = "seven"
	probes[1].Check.Path = "/other"
	probes = append(probes, probes[2], lb.Probe{ID: idOf(9)}) // one twice, and one without a check
	s.set(epoch, probes)
	got := ""
	for i := range 10 {
		if v, ok := s.verdicts()[idOf(i)]; ok {
			got += fmt.Sprintf("%d: %d probes; ", i, v.Probes)
		}
	}
	if want := "0: 1 probes; 1: 0 probes; 2: 1 probes; "; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(s.queue) != 3 {
		t.Errorf("%d wait, want 3", len(s.queue))
	}
	if s.targets[idOf(0)].probe.Via.UID != "seven" {
		t.Error("a probe that stays kept its old way")
	}
}

func TestAProbeUnderWayOfATargetThatIsGoneChangesNothing(t *testing.T) {
	s := newSchedule(func() float64 { return 0 })
	one := check
	one.Fall = 1
	s.set(epoch, probesOf(1, one))
	took := s.take(epoch)
	s.set(epoch, nil)
	s.set(epoch, probesOf(1, one)) // there again, as somebody new
	if finish(&s, took, epoch, "refused") || s.verdicts()[idOf(0)].Known || len(s.queue) != 1 {
		t.Errorf("got %+v, %d wait", s.verdicts(), len(s.queue))
	}
}

func TestSameLooksAtEveryField(t *testing.T) {
	other := lb.Check{Kind: "x", Port: 1, Path: "x", Host: "x", Codes: []lb.CodeRange{{}}, GRPCService: "x", Send: []byte("x"),
		Expect: []byte("x"), Interval: 1, Timeout: 1, Rise: 1, Fall: 1, Probers: 1, Reset: true}
	for i := range reflect.TypeFor[lb.Check]().NumField() {
		var c lb.Check
		field := reflect.ValueOf(&c).Elem().Field(i)
		field.Set(reflect.ValueOf(other).Field(i))
		if field.IsZero() || same(c, lb.Check{}) || !same(c, c) {
			t.Errorf("a different %s makes no difference", reflect.TypeFor[lb.Check]().Field(i).Name)
		}
	}
}
