// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with a mount namespace of its own, in which
// /sys shows its devices and /sys/fs/bpf is empty. Neither has a name outside
// of this process, so nothing is left when the process ends, however it ends.
type Namespace struct {
	Label   string
	Netlink *netlink.Handle

	fd   netns.NsHandle
	work chan func()
	done chan struct{}
}

// newNamespace makes a namespace, held by a thread that lives until Close.
func newNamespace(name string) (*Namespace, error) {
	n := &Namespace{Label: name, work: make(chan func()), done: make(chan struct{})}
	ready := make(chan error)
	go n.hold(ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make namespace %s: %w", name, err)
	}
	var err error
	if n.Netlink, err = netlink.NewHandleAt(n.fd); err != nil {
		return nil, fmt.Errorf("open netlink in %s: %w", name, err)
	}
	return n, nil
}

// hold runs n.work on one thread in the new namespaces. The thread is never
// unlocked, so it ends with this goroutine.
func (n *Namespace) hold(ready chan<- error) {
	defer close(n.done)
	runtime.LockOSThread()
	err := unshareAndMount()
	if err == nil {
		n.fd, err = netns.Get()
	}
	ready <- err
	if err != nil {
		return
	}
	for f := range n.work {
		f()
	}
}

func unshareAndMount() error {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare network and mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.Mount("bpf", "/sys/fs/bpf", "bpf", 0, ""); err != nil {
		return fmt.Errorf("mount /sys/fs/bpf: %w", err)
	}
	return nil
}

// onThread runs f on the thread that holds the namespaces: for what needs the
// mount namespace, and for starting processes, whose parent must not die.
func (n *Namespace) onThread(f func() error) error {
	result := make(chan error)
	n.work <- func() { result <- f() }
	return <-result
}

// Do runs f on a thread in the network namespace. Sockets that f opens belong
// to it; goroutines that f starts do not run in it.
func (n *Namespace) Do(f func() error) error {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("get network namespace: %w", err)
	}
	defer home.Close()
	if err := netns.Set(n.fd); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace %s: %w", n.Label, err)
	}
	defer func() {
		// A thread that cannot return home stays locked and dies with its goroutine.
		if netns.Set(home) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Sysctl sets net/... settings in the namespace.
func (n *Namespace) Sysctl(settings map[string]string) error {
	return n.Do(func() error {
		for name, value := range settings {
			path := filepath.Join("/proc/sys/net", name)
			if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
				return fmt.Errorf("set sysctl in %s: %w", n.Label, err)
			}
		}
		return nil
	})
}

// Device returns the index of a device.
func (n *Namespace) Device(name string) (int, error) {
	link, err := n.Netlink.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("find device %s in %s: %w", name, n.Label, err)
	}
	return link.Attrs().Index, nil
}

// Snmp returns one of the namespace's counters of /proc/net/snmp or snmp6, as
// "Icmp.OutDestUnreachs" or "Icmp6OutPktTooBigs".
func (n *Namespace) Snmp(counter string) (uint64, error) {
	var text []byte
	err := n.onThread(func() error {
		file := "snmp6"
		if strings.Contains(counter, ".") {
			file = "snmp"
		}
		var err error
		text, err = os.ReadFile("/proc/thread-self/net/" + file)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read counters of %s: %w", n.Label, err)
	}
	return parseSnmp(string(text), counter)
}

func parseSnmp(text, counter string) (uint64, error) {
	group, name, grouped := strings.Cut(counter, ".")
	var names []string
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if !grouped && len(fields) == 2 && fields[0] == counter {
			return parseCounter(fields[1])
		}
		if !grouped || len(fields) == 0 || fields[0] != group+":" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i, n := range names {
			if n == name && i < len(fields) {
				return parseCounter(fields[i])
			}
		}
	}
	return 0, fmt.Errorf("find counter %s: no such counter", counter)
}

func parseCounter(text string) (uint64, error) {
	var v uint64
	if _, err := fmt.Sscan(text, &v); err != nil {
		return 0, fmt.Errorf("parse counter %q: %w", text, err)
	}
	return v, nil
}

// close ends the thread; the kernel removes the namespaces with their last
// process.
func (n *Namespace) close() {
	close(n.work)
	<-n.done
	n.Netlink.Close()
	_ = n.fd.Close()
}
