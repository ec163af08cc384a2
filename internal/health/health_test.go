// SPDX-License-Identifier: Apache-2.0

package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// patience is for what must happen; the machine may be busy.
const patience = 30 * time.Second

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// start runs a prober until the test ends.
func start(t testing.TB, p *Prober) *Prober {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("Run returned %v", err)
			}
		case <-time.After(patience):
			t.Error("Run did not return")
		}
	})
	return p
}

func prober(t testing.TB) *Prober { return New(nil, func() {}, quiet) }

// await waits until a verdict is as it should be, and returns it.
func await(t testing.TB, p *Prober, id lb.ProbeID, what string, is func(Verdict) bool) Verdict {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if v := p.Verdicts()[id]; is(v) {
			return v
		}
	}
	t.Fatalf("%s: not %s: %+v", id, what, p.Verdicts()[id])
	return Verdict{}
}

func known(v Verdict) bool { return v.Known }

// quick is a check that is done often and decides at once.
func quick(kind lb.CheckKind) lb.Check {
	return lb.Check{Kind: kind, Interval: 20 * time.Millisecond, Timeout: 10 * time.Second, Rise: 1, Fall: 1}
}

// once is the verdict of one probe.
func once(t *testing.T, p *Prober, at netip.AddrPort, c lb.Check) Verdict {
	t.Helper()
	start(t, p)
	p.Set([]lb.Probe{{ID: idOf(1), Check: c, Address: at}})
	return await(t, p, idOf(1), "known", known)
}

func wantProblem(t *testing.T, v Verdict, want string) {
	t.Helper()
	if v.Problem != want || v.Healthy != (want == "") {
		t.Errorf("got healthy %v, problem %q; want problem %q", v.Healthy, v.Problem, want)
	}
}

// listen serves each connection with a function, which need not close it.
func listen(t testing.TB, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				serve(conn)
			}()
		}
	}()
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// untilClosed reads until the prober is gone.
func untilClosed(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// refused returns an address that nobody listens on.
func refused(t testing.TB) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp4", "127.0.0.1:0")
	must(t, err)
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).AddrPort()
}

// full returns an address that answers no SYN: its backlog is full.
func full(t testing.TB) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	must(t, unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}))
	must(t, unix.Listen(fd, 0))
	name, err := unix.Getsockname(fd)
	must(t, err)
	at := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(name.(*unix.SockaddrInet4).Port))
	for range 10 {
		conn, err := net.DialTimeout("tcp", at.String(), 200*time.Millisecond)
		if err != nil {
			return at
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the backlog is never full")
	return at
}

func TestTCP(t *testing.T) {
	wantProblem(t, once(t, prober(t), listen(t, untilClosed), quick(lb.CheckTCP)), "")
	wantProblem(t, once(t, prober(t), refused(t), quick(lb.CheckTCP)), "connect: connection refused")
	short := quick(lb.CheckTCP)
	short.Timeout = 100 * time.Millisecond
	wantProblem(t, once(t, prober(t), full(t), short), "timeout after 100ms")
}

func TestTCPOverIPv6(t *testing.T) {
	listener, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	wantProblem(t, once(t, prober(t), listener.Addr().(*net.TCPAddr).AddrPort(), quick(lb.CheckTCP)), "")
}

func TestTCPEndsWithAReset(t *testing.T) {
	ends := make(chan error, 100)
	at := listen(t, func(conn net.Conn) {
		_, err := conn.Read(make([]byte, 1))
		ends <- err
	})
	once(t, prober(t), at, quick(lb.CheckTCP))
	if err := <-ends; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the connection ended with %v", err)
	}
}

// packets answers each UDP packet with a function's result; nil: not.
func packets(t *testing.T, answer func([]byte) []byte) netip.AddrPort {
	t.Helper()
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	go func() {
		buffer := make([]byte, 2048)
		for {
			n, from, err := conn.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			if reply := answer(buffer[:n]); reply != nil {
				_, _ = conn.WriteToUDPAddrPort(reply, from)
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestUDP(t *testing.T) {
	echo := packets(t, func(b []byte) []byte { return append([]byte("re: "), b...) })
	silent := packets(t, func([]byte) []byte { return nil })
	c := quick(lb.CheckUDP)
	c.Send, c.Expect = []byte("ping"), []byte("re: pi")
	wantProblem(t, once(t, prober(t), echo, c), "")
	c.Expect = nil
	wantProblem(t, once(t, prober(t), echo, c), "")
	c.Send = nil // an empty packet
	wantProblem(t, once(t, prober(t), echo, c), "")
	c.Expect = []byte("pong")
	wantProblem(t, once(t, prober(t), echo, c), `reply begins "re: ", want "pong"`)
	wantProblem(t, once(t, prober(t), refused(t), c), "exchange: connection refused")
	c.Timeout = 50 * time.Millisecond
	wantProblem(t, once(t, prober(t), silent, c), "timeout after 50ms")
}

func TestBindSeesTunneledSocketsBeforeTheyAreConnected(t *testing.T) {
	var calls, wrong atomic.Int32
	bind := func(probe lb.Probe, fd int) error {
		calls.Add(1)
		if _, err := unix.Getpeername(fd); err != unix.ENOTCONN || probe.Via.UID != "five" {
			wrong.Add(1)
		}
		return nil
	}
	at := listen(t, untilClosed)
	for _, kind := range []lb.CheckKind{lb.CheckTCP, lb.CheckHTTP} {
		calls.Store(0)
		p := start(t, New(bind, func() {}, quiet))
		c := quick(kind)
		c.Timeout = 20 * time.Millisecond
		p.Set([]lb.Probe{{ID: idOf(1), Check: c, Address: at, Via: lb.BackendID{UID: "five"}, Tunneled: true}, {ID: idOf(2), Check: c, Address: at}})
		await(t, p, idOf(2), "known", known)
		await(t, p, idOf(1), "known", known)
		p.Set(nil)
		if calls.Load() == 0 || wrong.Load() > 0 {
			t.Errorf("%s: %d calls, %d with another socket or probe", kind, calls.Load(), wrong.Load())
		}
	}
}

func TestABindThatFailsIsNoBackendsProblem(t *testing.T) {
	var calls atomic.Int32
	p := start(t, New(func(lb.Probe, int) error { calls.Add(1); return unix.ENOENT }, func() {}, quiet))
	at := listen(t, untilClosed)
	p.Set([]lb.Probe{
		{ID: idOf(1), Check: quick(lb.CheckTCP), Address: at, Tunneled: true},
		{ID: idOf(2), Check: quick(lb.CheckHTTP), Address: at, Tunneled: true},
		{ID: idOf(3), Check: quick(lb.CheckTCP)}, // no address
		{ID: idOf(4), Check: quick("SMTP"), Address: at},
	})
	for end := time.Now().Add(patience); calls.Load() < 10 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	for id, v := range p.Verdicts() {
		if !v.Healthy || v.Known || calls.Load() < 10 {
			t.Errorf("after %d calls: %s: %+v", calls.Load(), id, v)
		}
	}
}

func TestAFlapIsReportedAndSuspectsAreProbed(t *testing.T) {
	var ill atomic.Bool
	at := packets(t, func([]byte) []byte {
		if ill.Load() {
			return []byte("ill")
		}
		return []byte("well")
	})
	changed := make(chan struct{}, 100)
	p := start(t, New(nil, func() { changed <- struct{}{} }, quiet))
	c := quick(lb.CheckUDP)
	c.Interval, c.Expect = 20*time.Second, []byte("w")
	probe := lb.Probe{ID: idOf(1), Check: c, Address: at}
	p.Set([]lb.Probe{probe})
	v := await(t, p, probe.ID, "known", known)
	ill.Store(true)
	began := time.Now()
	p.Suspect(probe.ID) // at most 2 s after the last probe: more often may be too much for the backend
	probe.Via.UID = "three"
	p.Set([]lb.Probe{probe})
	if again := p.Verdicts()[probe.ID]; again != v {
		t.Errorf("Set made of %+v %+v", v, again)
	}
	await(t, p, probe.ID, "unhealthy", func(v Verdict) bool { return !v.Healthy })
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("a suspect was probed after %s", took)
	}
	select {
	case <-changed:
	case <-time.After(patience):
		t.Error("changed was not called")
	}
	p.Set(nil)
	if left := p.Verdicts(); len(left) > 0 {
		t.Errorf("got %v, want nobody", left)
	}
}

func TestManyFlapsAreReportedTogether(t *testing.T) {
	var calls atomic.Int32
	p := start(t, New(nil, func() { calls.Add(1) }, quiet))
	began := time.Now()
	c, at := quick(lb.CheckTCP), refused(t)
	c.Interval = 500 * time.Millisecond
	probes := probesOf(1000, c)
	for i := range probes {
		probes[i].Address = at
	}
	p.Set(probes)
	for _, probe := range probes {
		await(t, p, probe.ID, "unhealthy", func(v Verdict) bool { return !v.Healthy })
	}
	if most := int32(time.Since(began)/spacing) + 2; calls.Load() == 0 || calls.Load() > most {
		t.Errorf("%d calls in %s, want at most %d", calls.Load(), time.Since(began), most)
	}
}

func TestNeverTwoProbesAtOnce(t *testing.T) {
	var now, most atomic.Int32
	at := listen(t, func(conn net.Conn) {
		if n := now.Add(1); n > most.Load() {
			most.Store(n)
		}
		_, _ = conn.Read(make([]byte, 1024))
		time.Sleep(50 * time.Millisecond)
		now.Add(-1)
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
	})
	p := start(t, prober(t))
	p.Set([]lb.Probe{{ID: idOf(1), Check: quick(lb.CheckHTTP), Address: at}})
	await(t, p, idOf(1), "probed thrice", func(v Verdict) bool {
		p.Suspect(idOf(1))
		return v.Probes >= 3
	})
	if most.Load() != 1 {
		t.Errorf("%d probes at once", most.Load())
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

func TestNothingLeaks(t *testing.T) {
	silent, closed := full(t), refused(t)
	open := listen(t, func(net.Conn) {}) // which closes at once
	udp := packets(t, func(b []byte) []byte { return b })
	p := start(t, prober(t))
	var probes []lb.Probe
	add := func(kind lb.CheckKind, at netip.AddrPort) {
		c := quick(kind)
		c.Timeout, c.Send = 10*time.Millisecond, []byte("x")
		probes = append(probes, lb.Probe{ID: idOf(len(probes)), Check: c, Address: at})
	}
	p.Set(nil)
	time.Sleep(10 * time.Millisecond)
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
	for range 4 {
		for _, at := range []netip.AddrPort{silent, closed, open} {
			for _, kind := range []lb.CheckKind{lb.CheckTCP, lb.CheckHTTP, lb.CheckHTTPS, lb.CheckGRPC} {
				add(kind, at)
			}
		}
		add(lb.CheckUDP, udp)
		add(lb.CheckUDP, closed)
	}
	p.Set(probes)
	for _, probe := range probes {
		await(t, p, probe.ID, "probed often", func(v Verdict) bool { return v.Probes >= 40 }) // 2,240 in all
	}
	p.Set(nil)
	var left string
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		f, g := descriptors(t), runtime.NumGoroutine()
		if f <= fds+1 && g <= goroutines+1 {
			return
		}
		left = fmt.Sprintf("%d descriptors and %d goroutines, before %d and %d", f, g, fds, goroutines)
	}
	t.Error(left)
}

func TestConcurrentUse(t *testing.T) {
	at := listen(t, untilClosed)
	p := start(t, New(nil, func() {}, quiet))
	done := make(chan struct{})
	for i := range 4 {
		go func() {
			defer func() { done <- struct{}{} }()
			for n := range 100 {
				c := quick(lb.CheckTCP)
				c.Fall = 1 + n%3
				probes := probesOf(50+i, c)
				for j := range probes {
					probes[j].Address = at
				}
				p.Set(probes)
				p.Suspect(probes[n%50].ID, probes[0].ID)
				_ = p.Verdicts()
			}
		}()
	}
	for range 4 {
		<-done
	}
	if n := len(p.Verdicts()); n < 50 || n > 53 {
		t.Errorf("%d backends are left", n)
	}
}

func TestTheLogIsBounded(t *testing.T) {
	var text strings.Builder
	var l limiter
	log := slog.New(slog.NewTextHandler(&text, nil))
	said := make([]func(), 100)
	for i := range said {
		said[i] = func() { log.Info("flap") }
	}
	l.say(log, said)
	if n := strings.Count(text.String(), "flap"); n != linesPerSecond {
		t.Errorf("%d lines", n)
	}
	l.second = l.second.Add(-time.Second)
	l.say(log, said[:1])
	if !strings.Contains(text.String(), "90 lines about the health of backends were left out") {
		t.Error(text.String())
	}
}

func TestThePollerIsWokenForWhatItDoesNotKnowAlone(t *testing.T) {
	poller, err := newPoller(nil)
	must(t, err)
	defer poller.close()
	woken := func() bool {
		_, err := unix.Read(poller.event, make([]byte, 8))
		return err == nil
	}
	p := prober(t)
	p.poller = poller
	p.schedule.random = func() float64 { return 0.5 }
	c := quick(lb.CheckTCP)
	c.Interval = 4 * time.Millisecond // due sooner than the poller cares to turn
	p.Set(probesOf(10, c))
	var probes []lb.Probe
	p.due(time.Now(), 0, &probes)
	woken()
	p.hurry()
	if woken() {
		t.Error("the poller was woken for those that it waits for")
	}
	c.Interval = time.Minute
	p.Set(probesOf(10, c))
	p.due(time.Now().Add(-time.Second), 0, &probes)
	woken()
	p.Suspect(idOf(3))
	p.Suspect(idOf(4))
	if !woken() {
		t.Error("the poller was not woken for a suspect")
	}
	if woken() {
		t.Error("the poller was woken twice")
	}
}
