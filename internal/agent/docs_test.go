// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"fairlead.dev/fairlead/internal/dataplane"
	"fairlead.dev/fairlead/internal/file"
	"fairlead.dev/fairlead/internal/plan"
	"fairlead.dev/fairlead/internal/status"
)

var update = flag.Bool("update", false, "rewrite the generated documents")

// Every reason has an explanation, and no explanation is of none.
func TestEveryDropIsExplained(t *testing.T) {
	known := map[string]bool{}
	for _, name := range dataplane.DropNames() {
		if name == "" {
			continue
		}
		known[name] = true
		e := status.Explanations[name]
		if e.Means == "" || e.Remedy == "" {
			t.Errorf("drop reason %q is not explained", name)
		}
	}
	for name := range status.Explanations {
		if !known[name] {
			t.Errorf("%q is explained, and no packet is dropped for it", name)
		}
	}
}

func TestDropsDocument(t *testing.T) {
	var b strings.Builder
	b.WriteString("# Why packets are dropped\n\nEvery packet that Fairlead drops is counted under one reason, which `fairlead status` shows, and\n`fairlead_dropped_packets_total{reason=...}`. This page is generated from the code.\n\n| reason | in `bpf/reasons.h` | means | what to do |\n|---|---|---|---|\n")
	for _, name := range dataplane.DropNames() {
		if name != "" {
			e := status.Explanations[name]
			fmt.Fprintf(&b, "| `%s` | `DROP_%s` | %s | %s |\n", name, strings.ToUpper(name), e.Means, e.Remedy)
		}
	}
	generated(t, "../../docs/drops.md", b.String())
}

func TestLintDocument(t *testing.T) {
	var b strings.Builder
	b.WriteString("# What `fairlead lint` finds\n\nCodes are stable and never used again. An error keeps the last good state in force; a warning does not.\nThis page is generated from the code.\n\n| code | severity | what | what to do |\n|---|---|---|---|\n")
	seen := map[string]bool{}
	for _, r := range slices.Concat(file.Rules, plan.Rules) {
		if seen[r.Code] {
			t.Errorf("code %s stands twice", r.Code)
		}
		seen[r.Code] = true
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", r.Code, r.Severity, r.Title, r.Remedy)
	}
	generated(t, "../../docs/lint.md", b.String())
}

// generated compares a document with what it should be, or rewrites it.
func generated(t *testing.T, path, want string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != want {
		t.Errorf("%s is not what the code says (%v); run: go test ./internal/agent -run Document -update", path, err)
	}
}
