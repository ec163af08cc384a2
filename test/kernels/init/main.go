// SPDX-License-Identifier: Apache-2.0

// Command init is the first and only program of a test kernel: it prepares
// the machine, runs the test binary with init's own arguments, tells how that
// ended, and switches the machine off.
package main

import (
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// The console keeps kernel messages; results have a line of their own.
	results = "/dev/ttyS1"
	binary  = "/test"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("init: ")
	if err := run(); err != nil {
		log.Print(err)
	}
	// QEMU is told to leave where the machine would start again.
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART); err != nil {
		log.Fatalf("restart: %v", err)
	}
}

func run() error {
	if err := mount(); err != nil {
		return err
	}
	out, err := openRaw(results)
	if err != nil {
		return err
	}
	// Both must have left the line before the machine goes off.
	defer func() {
		if err := errors.Join(drain(out), out.Close()); err != nil {
			log.Print(err)
		}
	}()
	log.SetOutput(io.MultiWriter(os.Stderr, out))

	if err := insertModules("/modules"); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("ask for the kernel's name: %w", err)
	}
	fmt.Fprintf(out, "init: kernel %s\n", unix.ByteSliceToString(name.Release[:]))

	directory, err := os.ReadFile("/directory")
	if err != nil {
		return fmt.Errorf("read the test's directory: %w", err)
	}
	cmd := exec.Command(binary, os.Args[1:]...)
	cmd.Dir = string(directory)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = []string{"HOME=/", "PATH=/", "TMPDIR=/tmp"}
	err = cmd.Run()
	if cmd.ProcessState == nil {
		return fmt.Errorf("run the test: %w", err)
	}
	fmt.Fprintf(out, "init: exit %d\n", cmd.ProcessState.ExitCode())
	return nil
}

// mount makes what every test may expect of a machine.
func mount() error {
	for _, m := range []struct{ kind, at string }{
		{"devtmpfs", "/dev"},
		{"proc", "/proc"},
		{"sysfs", "/sys"},
		{"bpf", "/sys/fs/bpf"},
		{"tmpfs", "/tmp"},
		{"tmpfs", "/run"},
	} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return fmt.Errorf("make %s: %w", m.at, err)
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	return nil
}

// openRaw opens a serial line that passes bytes on as they are.
func openRaw(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open the line for results: %w", err)
	}
	line, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err == nil {
		line.Oflag &^= unix.OPOST
		err = unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, line)
	}
	if err != nil {
		return nil, fmt.Errorf("set %s raw: %w", path, errors.Join(err, f.Close()))
	}
	return f, nil
}

// drain waits until everything written has left.
func drain(f *os.File) error {
	if err := unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1); err != nil {
		return fmt.Errorf("drain the line for results: %w", err)
	}
	return nil
}

// insertModules inserts the kernel modules of a directory in order of name.
func insertModules(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*.ko*"))
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	for _, path := range paths {
		if err := insertModule(path); err != nil {
			return fmt.Errorf("insert %s: %w", path, err)
		}
	}
	return nil
}

func insertModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if !strings.HasSuffix(path, ".ko") {
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	return unix.FinitModule(int(f.Fd()), "", flags)
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}
