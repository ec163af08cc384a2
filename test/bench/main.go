// SPDX-License-Identifier: Apache-2.0

// Command bench runs the benchmarks and prints them as a table. What the
// benchmarks themselves print, which benchstat reads, comes first.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// packet is where the benchmarks of the packet path are.
const packet = "./internal/dataplane"

func main() {
	group := flag.String("group", "all", "which benchmarks: packet, or all")
	bench := flag.String("bench", ".", "those that match, as in go test -bench")
	benchtime := flag.String("benchtime", "0.3s", "time for each in each round")
	rounds := flag.Int("rounds", 3, "how often each runs; rounds are taken in turn")
	flag.Parse()
	if err := run(*group, *bench, *benchtime, *rounds); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(group, bench, benchtime string, rounds int) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("BPF programs can be run by root alone; run: sudo env PATH=\"$PATH\" make bench")
	}
	packages := []string{packet}
	if group != "packet" {
		found, err := packagesWithBenchmarks(".")
		if err != nil {
			return err
		}
		packages = found
	}
	var raw bytes.Buffer
	for round := range rounds {
		fmt.Printf("== round %d of %d\n", round+1, rounds)
		// One package at a time, so that none disturbs another.
		cmd := exec.Command("go", append([]string{"test", "-p", "1", "-timeout", "1h", "-count", "1",
			"-run", "^$", "-bench", bench, "-benchtime", benchtime}, packages...)...)
		cmd.Stdout = io.MultiWriter(os.Stdout, &raw)
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("run benchmarks: %w", err)
		}
	}
	results := parse(raw.String())
	if len(results) == 0 {
		return fmt.Errorf("run benchmarks: none matches %q", bench)
	}
	return table(os.Stdout, results)
}

// packagesWithBenchmarks lists the directories below root that have any.
func packagesWithBenchmarks(root string) ([]string, error) {
	var packages []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		if err == nil && bytes.Contains(source, []byte("\nfunc Benchmark")) {
			packages = append(packages, "./"+filepath.Dir(path))
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look for benchmarks: %w", err)
	}
	slices.Sort(packages)
	return slices.Compact(packages), nil
}
