// SPDX-License-Identifier: Apache-2.0

package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"
)

// Process is a command that runs in a namespace. It dies with this process.
type Process struct {
	Log *Log

	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// Log is the output of a process so far.
type Log struct {
	mu   sync.Mutex
	text bytes.Buffer
}

// Write appends.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String returns all output so far.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Start starts a command in the namespace.
func (n *Namespace) Start(name string, args ...string) (*Process, error) {
	p := &Process{Log: &Log{}, cmd: exec.Command(name, args...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p.Log, p.Log
	p.cmd.Env = append(os.Environ(), "NO_COLOR=1")
	// A group of its own, so that an interrupt at the terminal reaches only us.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := n.onThread(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s in %s: %w", name, n.Label, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// Run runs a command in the namespace and returns its output.
func (n *Namespace) Run(name string, args ...string) (string, error) {
	p, err := n.Start(name, args...)
	if err != nil {
		return "", err
	}
	if err := p.Wait(30 * time.Second); err != nil {
		return p.Log.String(), fmt.Errorf("run %s in %s: %w: %s", name, n.Label, err, p.Log)
	}
	return p.Log.String(), nil
}

// Wait waits until the process has ended; one that has not is killed.
func (p *Process) Wait(timeout time.Duration) error {
	select {
	case <-p.done:
		return p.err
	case <-time.After(timeout):
		p.Kill()
		return errors.New("timed out")
	}
}

// Running tells whether the process has not ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Stop asks the process to end, and kills it when it does not.
func (p *Process) Stop() error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	return p.Wait(3 * time.Second)
}

// Kill ends the process without asking.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// PID of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }
