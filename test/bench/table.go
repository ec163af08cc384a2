// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A result is one benchmark's figures, by unit, one for each round.
type result struct {
	name    string
	figures map[string][]float64
	units   []string // in the order printed
}

// processors matches the suffix that Go appends to names.
var processors = regexp.MustCompile(`-\d+$`)

// parse reads Go's benchmark format and ignores all other lines.
func parse(raw string) []*result {
	var results []*result
	byName := map[string]*result{}
	for line := range strings.Lines(raw) {
		fields := strings.Fields(line)
		if len(fields) < 4 || len(fields)%2 != 0 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := processors.ReplaceAllString(strings.TrimPrefix(fields[0], "Benchmark"), "")
		r := byName[name]
		if r == nil {
			r = &result{name: name, figures: map[string][]float64{}}
			byName[name] = r
			results = append(results, r)
		}
		for i := 2; i < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				continue
			}
			unit := fields[i+1]
			if len(r.figures[unit]) == 0 {
				r.units = append(r.units, unit)
			}
			r.figures[unit] = append(r.figures[unit], value)
		}
	}
	return results
}

// table prints a block for each benchmark function: its cases, and the median
// of the rounds for each unit.
func table(out io.Writer, results []*result) error {
	for len(results) > 0 {
		function, _, _ := strings.Cut(results[0].name, "/")
		var block, rest []*result
		for _, r := range results {
			if f, _, _ := strings.Cut(r.name, "/"); f == function {
				block = append(block, r)
			} else {
				rest = append(rest, r)
			}
		}
		if err := printBlock(out, function, block); err != nil {
			return fmt.Errorf("print the table: %w", err)
		}
		results = rest
	}
	return nil
}

func printBlock(out io.Writer, function string, block []*result) error {
	var units []string
	for _, r := range block {
		for _, unit := range r.units {
			if !slices.Contains(units, unit) {
				units = append(units, unit)
			}
		}
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "\n%s\t%s\n", function, strings.Join(units, "\t"))
	for _, r := range block {
		fmt.Fprintf(w, "  %s", strings.TrimPrefix(strings.TrimPrefix(r.name, function), "/"))
		for _, unit := range units {
			if figures := r.figures[unit]; len(figures) > 0 {
				fmt.Fprintf(w, "\t%.4g", median(figures))
			} else {
				fmt.Fprint(w, "\t-")
			}
		}
		fmt.Fprintln(w)
	}
	return w.Flush()
}

func median(figures []float64) float64 {
	sorted := slices.Sorted(slices.Values(figures))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
