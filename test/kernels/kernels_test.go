// SPDX-License-Identifier: Apache-2.0

// Package kernels runs the tests of the dataplane on the kernels that Fairlead
// promises to work on: Debian's own, booted in QEMU under emulation with
// nothing but the test binary.
package kernels

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"fairlead.dev/fairlead/internal/need"
)

var (
	packageFlag = flag.String("package", "internal/dataplane", "directory of the package whose tests run on each kernel")
	runFlag     = flag.String("guestrun", ".", "its tests to run, as in go test -run, without spaces")
	limitFlag   = flag.Duration("limit", 10*time.Minute, "time that one kernel may take")
)

// series are the kernels promised: the floor, and Debian's next.
var series = []struct{ version, metapackage string }{
	{"6.1", "linux-image-cloud-amd64"},
	{"6.12", "linux-image-6.12-cloud-amd64"},
}

// root is the repository, seen from here.
const root = "../.."

func TestKernels(t *testing.T) {
	need.Tool(t, "qemu-system-x86_64")
	need.Tool(t, "apt-get")
	need.Tool(t, "dpkg-deb")

	dir := t.TempDir()
	testBinary, initBinary := filepath.Join(dir, "test"), filepath.Join(dir, "init")
	build(t, "test", "-c", "-o", testBinary, "./"+*packageFlag)
	build(t, "build", "-o", initBinary, "./test/kernels/init")

	for _, s := range series {
		t.Run("linux-"+s.version, func(t *testing.T) {
			// One at a time: apt locks its lists.
			k, err := fetch(s.metapackage)
			if err != nil {
				t.Fatal(err)
			}
			t.Parallel()
			initramfs := filepath.Join(t.TempDir(), "initramfs")
			if err := pack(initramfs, testBinary, initBinary, k.modules); err != nil {
				t.Fatal(err)
			}
			report(t, s.version, boot(t, k, initramfs))
		})
	}
}

// build runs the Go command at the root for a program that needs no C library.
func build(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// pack writes an initramfs with what the guest needs: the two programs, the
// modules, and the files that tests read, at their places in the repository.
func pack(to, testBinary, initBinary string, modules []string) error {
	file, err := os.Create(to)
	if err != nil {
		return fmt.Errorf("make the initramfs: %w", err)
	}
	defer file.Close()
	a := newArchive(file)
	directory := path.Join("/src", *packageFlag)
	a.addDirectory(strings.TrimPrefix(directory, "/"))
	a.add("/directory", []byte(directory))
	files := map[string]string{"/init": initBinary, "/test": testBinary}
	for i, module := range modules {
		files[fmt.Sprintf("/modules/%d-%s", i, filepath.Base(module))] = module
	}
	for _, tree := range []string{"bpf", "docs", "examples", *packageFlag} {
		err := filepath.WalkDir(filepath.Join(root, tree), func(from string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				files[path.Join("/src", strings.TrimPrefix(from, root))] = from
			}
			return err
		})
		if err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("list %s: %w", tree, err)
		}
	}
	for to, from := range files {
		if err := a.addFile(to, from); err != nil {
			return err
		}
	}
	return a.close()
}

// boot runs a kernel until its init has finished, and returns what the test
// binary wrote. What the kernel said is shown when the test fails.
func boot(t *testing.T, k kernel, initramfs string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), *limitFlag)
	defer cancel()
	console := filepath.Join(t.TempDir(), "console")
	results := filepath.Join(t.TempDir(), "results")
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		"-accel", "tcg", "-cpu", "max,la57=off", "-m", "2048", "-no-reboot", "-nodefaults", "-nographic",
		"-kernel", k.image, "-initrd", initramfs,
		"-serial", "file:"+console, "-serial", "file:"+results,
		"-append", "console=ttyS0 loglevel=5 panic=-1 -- -test.v=test2json -test.run="+*runFlag+
			fmt.Sprintf(" -test.timeout=%s", *limitFlag))
	out, err := cmd.CombinedOutput()
	t.Cleanup(func() {
		if t.Failed() {
			said, err := os.ReadFile(console)
			t.Logf("%s\n%s\n(%v)", out, said[max(0, len(said)-4000):], err)
		}
	})
	if ctx.Err() != nil {
		t.Errorf("the kernel did not finish within %s", *limitFlag)
	} else if err != nil {
		t.Errorf("run qemu: %v", err)
	}
	data, err := os.ReadFile(results)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// An event is one line of test2json.
type event struct {
	Action, Test, Output string
	Elapsed              float64 // seconds, of what has ended
}

// report makes each test of the guest a subtest of t.
func report(t *testing.T, version string, results []byte) {
	t.Helper()
	if release := kernelRelease(results); strings.HasPrefix(release, version+".") {
		t.Logf("ran on Linux %s", release)
	} else {
		t.Errorf("booted Linux %q, want %s", release, version)
	}
	events, err := decode(results)
	if err != nil {
		t.Fatal(err)
	}
	output, outcome, order := map[string]*strings.Builder{}, map[string]string{}, []string{}
	took := map[string]float64{}
	for _, e := range events {
		if output[e.Test] == nil {
			output[e.Test] = &strings.Builder{}
			order = append(order, e.Test)
		}
		output[e.Test].WriteString(e.Output)
		if slices.Contains([]string{"pass", "fail", "skip"}, e.Action) {
			outcome[e.Test], took[e.Test] = e.Action, e.Elapsed
		}
	}
	ran := 0
	for _, name := range order {
		text := output[name].String()
		switch {
		case name == "":
			// Output of no test: a panic, a race, what init said.
			if !bytes.Contains(results, []byte("init: exit 0\n")) {
				t.Errorf("the test binary did not succeed:\n%s", text)
			}
		case outcome[name] == "pass":
			ran++
			t.Run(name, func(t *testing.T) { t.Logf("took %.1f s on this kernel", took[name]) })
		case outcome[name] == "skip" && wantsTool.MatchString(text):
			// Tools that look at packets from outside run on this
			// machine's kernel; a guest has none.
			t.Logf("not on this kernel: %s: %s", name, strings.TrimSpace(wantsTool.FindString(text)))
		default:
			t.Run(name, func(t *testing.T) { t.Errorf("outcome %q:\n%s", outcome[name], text) })
		}
	}
	if ran == 0 {
		t.Errorf("no test passed on this kernel")
	}
}

// wantsTool matches what need.Tool says when it skips.
var wantsTool = regexp.MustCompile(`needs \S+: exec: .*`)

var saidRelease = regexp.MustCompile(`(?m)^init: kernel (.*)$`)

func kernelRelease(results []byte) string {
	match := saidRelease.FindSubmatch(results)
	if match == nil {
		return ""
	}
	return string(match[1])
}

// decode turns the output of a test binary into events.
func decode(results []byte) ([]event, error) {
	cmd := exec.Command("go", "tool", "test2json")
	cmd.Stdin = bytes.NewReader(results)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run test2json: %w", err)
	}
	var events []event
	for scanner := bufio.NewScanner(bytes.NewReader(out)); scanner.Scan(); {
		var e event
		if err := json.Unmarshal(scanner.Bytes(), &e); err != nil {
			return nil, fmt.Errorf("decode %q: %w", scanner.Text(), err)
		}
		events = append(events, e)
	}
	return events, nil
}
