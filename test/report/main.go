// SPDX-License-Identifier: Apache-2.0

// Command report reads what `go test -json` writes and says, for people, what
// ran: a line for each package, the output of each test that failed, the
// reason of each that was skipped. It fails when any was, or when none ran.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() {
	counts := flag.String("counts", "", "file to append the numbers of passed, failed and skipped tests to")
	verbose := flag.Bool("v", false, "name the tests that passed too, and what they logged")
	flag.Parse()

	r := newReporter(os.Stdout, *verbose)
	err := r.read(os.Stdin)
	if *counts != "" {
		err = errors.Join(err, r.appendCounts(*counts))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
	if r.failed+r.skipped > 0 || r.passed == 0 {
		os.Exit(1)
	}
}

// An event is a line of `go test -json`.
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

type test struct{ pkg, name string }

// A reporter counts leaves: a test with subtests counts as those, unless it
// failed and none of them did.
type reporter struct {
	out                     io.Writer
	verbose                 bool
	output                  map[test]*strings.Builder
	parents                 map[test]bool // tests with subtests
	failedBelow             map[test]bool // tests with a subtest that failed
	passedIn                map[string]int
	failedIn                map[string]int
	passed, failed, skipped int
}

func newReporter(out io.Writer, verbose bool) *reporter {
	return &reporter{
		out: out, verbose: verbose,
		output:      map[test]*strings.Builder{},
		parents:     map[test]bool{},
		failedBelow: map[test]bool{},
		passedIn:    map[string]int{},
		failedIn:    map[string]int{},
	}
}

// read reports events as they come. A line that is no event is shown.
func (r *reporter) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil && e.Action != "" {
				r.handle(e)
			} else {
				fmt.Fprintf(r.out, "%s", line)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

func (r *reporter) handle(e event) {
	t := test{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "run":
		for parent, ok := above(t); ok; parent, ok = above(parent) {
			r.parents[parent] = true
		}
	case "output":
		if r.output[t] == nil {
			r.output[t] = &strings.Builder{}
		}
		r.output[t].WriteString(e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.endPackage(e)
		} else {
			r.endTest(t, e.Action)
		}
		delete(r.output, t)
	}
}

func (r *reporter) endTest(t test, action string) {
	switch {
	case action == "skip":
		r.skipped++
		fmt.Fprintf(r.out, "SKIP %s %s\n%s", t.pkg, t.name, r.text(t))
	case action == "fail":
		if !r.failedBelow[t] {
			r.failed++
			r.failedIn[t.pkg]++
		}
		for parent, ok := above(t); ok; parent, ok = above(parent) {
			r.failedBelow[parent] = true
		}
		fmt.Fprintf(r.out, "FAIL %s %s\n%s", t.pkg, t.name, r.text(t))
	case r.parents[t]:
		if r.verbose {
			fmt.Fprint(r.out, r.text(t))
		}
	default:
		r.passed++
		r.passedIn[t.pkg]++
		if r.verbose {
			fmt.Fprintf(r.out, "pass %s\n%s", t.name, r.text(t))
		}
	}
}

func (r *reporter) endPackage(e event) {
	t := test{e.Package, ""}
	switch {
	case e.Action == "fail":
		if r.failedIn[e.Package] == 0 {
			// It did not compile, or ended outside of any test.
			r.failed++
		}
		fmt.Fprintf(r.out, "FAIL %s\n%s", e.Package, r.text(t))
	case r.passedIn[e.Package] > 0:
		fmt.Fprintf(r.out, "ok   %-50s %5d passed %7.1fs\n", e.Package, r.passedIn[e.Package], e.Elapsed)
	}
	delete(r.passedIn, e.Package) // the same package may run again
	delete(r.failedIn, e.Package)
}

// text is what a test wrote, without the lines that say only that it ran.
func (r *reporter) text(t test) string {
	if r.output[t] == nil {
		return ""
	}
	var kept strings.Builder
	for line := range strings.Lines(r.output[t].String()) {
		frame := strings.TrimSpace(line)
		if !strings.HasPrefix(frame, "=== ") && !strings.HasPrefix(frame, "--- PASS") && frame != "PASS" && frame != "FAIL" {
			kept.WriteString(line)
		}
	}
	return kept.String()
}

func (r *reporter) appendCounts(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return fmt.Errorf("open counts: %w", err)
	}
	failed := r.failed
	if r.passed+r.failed+r.skipped == 0 {
		failed = 1 // tests were expected, and none ran
	}
	_, err = fmt.Fprintln(f, r.passed, failed, r.skipped)
	return errors.Join(err, f.Close())
}

// above returns the test that a subtest belongs to.
func above(t test) (test, bool) {
	i := strings.LastIndexByte(t.name, '/')
	if i < 0 {
		return test{}, false
	}
	return test{t.pkg, t.name[:i]}, true
}
