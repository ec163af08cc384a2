// SPDX-License-Identifier: Apache-2.0

package health

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"fairlead.dev/fairlead/internal/lb"
)

// maxFlights bounds the descriptors in use; more that are due wait.
const maxFlights = 8192

// poller does TCP and UDP probes with raw sockets: a probe costs its system
// calls and little more. All but wake is for one goroutine.
type poller struct {
	bind         func(p lb.Probe, fd int) error
	epoll, event int
	// file is epoll, and waiter waits for it with the runtime's own poller: a
	// goroutine that blocks in a system call 200 times a second would keep the
	// scheduler's monitor awake, which costs more than the probes' own code.
	file        *os.File
	waiter      syscall.RawConn
	flights     map[int32]*flight // by descriptor
	deadlines   queue[*flight]
	generation  int32
	events      [256]unix.EpollEvent
	buffer      [64 << 10]byte
	done, spare []outcome // what wait returns next, and returned last
}

// flight is a probe under way.
type flight struct {
	target   *target
	check    lb.Check
	started  time.Time
	deadline item[*flight]
	fd       int
	// generation tells it from others that had its descriptor: while this
	// process forks, the copy of a closed socket can still report events.
	generation int32
}

func newPoller(bind func(p lb.Probe, fd int) error) (*poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create an epoll instance: %w", err)
	}
	if err := unix.SetNonblock(epoll, true); err != nil { // or else the runtime would not poll it
		unix.Close(epoll)
		return nil, fmt.Errorf("make an epoll instance nonblocking: %w", err)
	}
	p := &poller{bind: bind, epoll: epoll, file: os.NewFile(uintptr(epoll), "epoll"), flights: map[int32]*flight{}}
	if p.waiter, err = p.file.SyscallConn(); err == nil {
		p.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		p.file.Close()
		return nil, fmt.Errorf("create an eventfd: %w", err)
	}
	if err := p.watch(p.event, 0, unix.EPOLLIN); err != nil {
		p.close()
		return nil, fmt.Errorf("watch an eventfd: %w", err)
	}
	return p, nil
}

func (p *poller) close() {
	for _, f := range p.flights {
		unix.Close(f.fd)
	}
	unix.Close(p.event)
	p.file.Close()
}

func (p *poller) watch(fd int, generation int32, events uint32) error {
	return unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd), Pad: generation})
}

// wake ends a wait, from any goroutine.
func (p *poller) wake() {
	_, _ = unix.Write(p.event, binary.NativeEndian.AppendUint64(nil, 1))
}

// room returns how many more probes may start.
func (p *poller) room() int { return maxFlights - len(p.flights) }

// start begins a probe. Its outcome comes from a later wait.
func (p *poller) start(t *target, probe lb.Probe) {
	f := &flight{target: t, check: probe.Check, started: time.Now(), fd: -1}
	flying, err := p.launch(f, probe)
	switch {
	case flying:
		f.deadline = item[*flight]{at: f.started.Add(timeout(f.check)), of: f}
		heap.Push(&p.deadlines, &f.deadline)
		p.flights[int32(f.fd)] = f
	case err == nil:
		p.end(f, time.Now(), "")
	case isFault(err):
		p.release(f, false)
		p.done = append(p.done, outcome{target: t, started: f.started, ended: time.Now(), fault: err})
	default:
		p.end(f, time.Now(), problem(stage(probe.Check), err, 0))
	}
}

// stage names what a probe does when an error comes: of a TCP connection all
// that is asked is that it comes about.
func stage(c lb.Check) string {
	if c.Kind == lb.CheckUDP {
		return "exchange"
	}
	return "connect"
}

// launch opens the socket; flying says that the outcome is not known yet.
func (p *poller) launch(f *flight, probe lb.Probe) (flying bool, err error) {
	if !probe.Address.IsValid() {
		return false, fault{errors.New("the probe has no address")}
	}
	udp := probe.Check.Kind == lb.CheckUDP
	family, address := socketAddress(probe.Address)
	kind := unix.SOCK_STREAM
	if udp {
		kind = unix.SOCK_DGRAM
	}
	if f.fd, err = unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return false, fault{fmt.Errorf("open a socket: %w", err)}
	}
	if probe.Tunneled && p.bind != nil {
		if err := p.bind(probe, f.fd); err != nil {
			return false, fault{fmt.Errorf("bind the socket to its backend: %w", err)}
		}
	}
	wanted := uint32(unix.EPOLLOUT)
	err = unix.Connect(f.fd, address)
	switch {
	case udp && err == nil:
		wanted = unix.EPOLLIN
		if err = unix.Send(f.fd, probe.Check.Send, unix.MSG_NOSIGNAL); err != nil {
			return false, err
		}
	case err == nil:
		return false, nil
	case err != unix.EINPROGRESS && err != unix.EINTR:
		return false, err
	}
	p.generation++
	f.generation = p.generation
	if err := p.watch(f.fd, f.generation, wanted); err != nil {
		return false, fault{fmt.Errorf("watch a socket: %w", err)}
	}
	return true, nil
}

func socketAddress(a netip.AddrPort) (family int, address unix.Sockaddr) {
	ip := a.Addr().Unmap()
	if ip.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(a.Port()), Addr: ip.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: int(a.Port()), Addr: ip.As16()}
}

// wait returns the outcomes of probes; without any it returns when the time
// has come, or wake was called. They are valid until the next wait.
func (p *poller) wait(now, until time.Time) ([]outcome, error) {
	if len(p.deadlines) > 0 {
		until = earlier(until, p.deadlines[0].at)
	}
	if len(p.done) > 0 {
		until = now
	}
	n, err := p.look(until)
	if err != nil {
		return nil, fmt.Errorf("wait for probes: %w", err)
	}
	ended := time.Now()
	for _, e := range p.events[:n] {
		if e.Fd == int32(p.event) {
			_, _ = unix.Read(p.event, p.buffer[:8])
		} else if f := p.flights[e.Fd]; f != nil && f.generation == e.Pad {
			p.progress(f, ended, e.Events)
		}
	}
	// Who has answered is not blamed for this process being late: only whose
	// time was over before it was looked for answers, and all were seen, had
	// none. So it takes one more turn to end a probe that has none.
	for n < len(p.events) && len(p.deadlines) > 0 && !p.deadlines[0].at.After(now) {
		f := p.deadlines[0].of
		p.end(f, ended, timedOut(timeout(f.check)))
	}
	p.done, p.spare = p.spare[:0], p.done
	return p.spare, nil
}

// look waits for events until a time, and returns how many there are.
func (p *poller) look(until time.Time) (n int, err error) {
	if n, err = p.ready(); n > 0 || err != nil || !until.After(time.Now()) {
		return n, err
	}
	if err := p.file.SetReadDeadline(until); err != nil {
		return 0, err
	}
	outer := p.waiter.Read(func(uintptr) bool {
		n, err = p.ready()
		return n > 0 || err != nil
	})
	if err == nil && !errors.Is(outer, os.ErrDeadlineExceeded) {
		err = outer
	}
	return n, err
}

// ready returns how many events there are now.
func (p *poller) ready() (int, error) {
	for {
		n, err := unix.EpollWait(p.epoll, p.events[:], 0)
		if err != unix.EINTR {
			return max(n, 0), err
		}
	}
}

// progress looks at what happened to a socket.
func (p *poller) progress(f *flight, now time.Time, events uint32) {
	if f.check.Kind == lb.CheckUDP {
		n, err := unix.Read(f.fd, p.buffer[:])
		switch {
		case err == unix.EAGAIN || err == unix.EINTR: // as after a wrong checksum
		case err != nil:
			p.end(f, now, problem(stage(f.check), err, 0))
		default:
			p.end(f, now, compare(p.buffer[:n], f.check.Expect))
		}
		return
	}
	if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
		errno, err := unix.GetsockoptInt(f.fd, unix.SOL_SOCKET, unix.SO_ERROR)
		if err == nil && errno != 0 {
			err = unix.Errno(errno)
		}
		if err != nil {
			p.end(f, now, problem(stage(f.check), err, 0))
			return
		}
	}
	p.end(f, now, "")
}

// compare says what is wrong with a reply; "": nothing.
func compare(reply, expect []byte) string {
	if bytes.HasPrefix(reply, expect) {
		return ""
	}
	const most = 40
	return line(fmt.Sprintf("reply begins %q, want %q", reply[:min(len(reply), len(expect), most)], expect[:min(len(expect), most)]))
}

// end closes a probe's socket and notes the outcome.
func (p *poller) end(f *flight, now time.Time, problem string) {
	p.release(f, problem == "")
	p.done = append(p.done, outcome{target: f.target, started: f.started, ended: now, problem: problem})
}

// release closes a probe's socket. A connection ends with a RST, which leaves
// nobody with TIME_WAIT.
func (p *poller) release(f *flight, connected bool) {
	if f.deadline.queued {
		heap.Remove(&p.deadlines, f.deadline.index)
		delete(p.flights, int32(f.fd))
	}
	if f.fd < 0 {
		return
	}
	if connected && f.check.Kind == lb.CheckTCP {
		_ = unix.SetsockoptLinger(f.fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
	}
	unix.Close(f.fd)
}
