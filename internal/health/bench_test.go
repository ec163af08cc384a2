// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// acceptor makes the test binary, started with it in its environment, the one
// that is probed: its CPU time must not count as the prober's.
const acceptor = "FAIRLEAD_HEALTH_ACCEPTOR"

func TestMain(m *testing.M) {
	if os.Getenv(acceptor) != "" {
		if err := accept(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// accept accepts and closes connections to any address of this machine's
// loopback, until killed. It prints its port.
func accept() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{}); err != nil {
		return err
	}
	if err := unix.Listen(fd, 4096); err != nil {
		return err
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	fmt.Println(name.(*unix.SockaddrInet4).Port)
	for {
		if conn, _, err := unix.Accept(fd); err == nil {
			unix.Close(conn)
		}
	}
}

// BenchmarkProbes probes 10,000 backends every 5 s for about 10 s, and reports
// what that costs this process. On loopback that includes the kernel's work
// for both ends of the connections, so the same number of connections is made
// with the bare system calls for comparison. Run it with
//
//	go test -run x -bench Probes -benchtime 1x ./internal/health
func BenchmarkProbes(b *testing.B) {
	child := exec.Command(os.Args[0])
	child.Env = append(os.Environ(), acceptor+"=1")
	out, err := child.StdoutPipe()
	must(b, err)
	must(b, child.Start())
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	text, err := bufio.NewReader(out).ReadString('\n')
	must(b, err)
	port, err := strconv.ParseUint(strings.TrimSpace(text), 10, 16)
	must(b, err)
	probes := probesOf(10_000, lb.Check{Kind: lb.CheckTCP, Interval: 5 * time.Second, Timeout: time.Second, Rise: 2, Fall: 3})
	for i := range probes {
		to := netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
		probes[i].Address = netip.AddrPortFrom(to, uint16(port))
	}
	b.Run("prober", func(b *testing.B) {
		p := start(b, prober(b))
		p.Set(probes)
		time.Sleep(5 * time.Second) // each once
		for b.Loop() {
			before, failedBefore := totals(p)
			measure(b, func() uint64 {
				time.Sleep(10 * time.Second)
				done, _ := totals(p)
				return done - before
			})
			_, failed := totals(p)
			b.ReportMetric(float64(failed-failedBefore), "failed")
		}
	})
	b.Run("bare", func(b *testing.B) {
		for b.Loop() {
			measure(b, func() (done uint64) {
				for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(quantum) {
					for ; done < uint64(time.Since(began)*2000/time.Second); done++ {
						connect(b, probes[done%10_000].Address)
					}
				}
				return done
			})
		}
	})
}

// connect makes a connection and resets it, with the fewest system calls.
func connect(b *testing.B, to netip.AddrPort) {
	family, address := socketAddress(to)
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(b, err)
	must(b, unix.Connect(fd, address))
	must(b, unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}))
	must(b, unix.Close(fd))
}

// measure reports what a function costs, which returns how many probes it did.
func measure(b *testing.B, work func() uint64) {
	began := time.Now()
	user, system := cpu(b)
	done := work()
	wall := time.Since(began)
	nowUser, nowSystem := cpu(b)
	user, system = nowUser-user, nowSystem-system
	b.ReportMetric(100*(user+system).Seconds()/wall.Seconds(), "%core")
	b.ReportMetric(100*system.Seconds()/wall.Seconds(), "%kernel")
	b.ReportMetric(float64(done)/wall.Seconds(), "probes/s")
}

func totals(p *Prober) (done, failed uint64) {
	for _, v := range p.Verdicts() {
		done += v.Probes
		failed += v.Failures
	}
	return done, failed
}

func cpu(b *testing.B) (user, system time.Duration) {
	var usage unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &usage))
	return time.Duration(usage.Utime.Nano()), time.Duration(usage.Stime.Nano())
}
