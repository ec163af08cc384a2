// SPDX-License-Identifier: Apache-2.0

package fairlead

import (
	"slices"
	"strings"
	"testing"
)

const goHead = "// SPDX-License-Identifier: Apache-2.0\n\n"

// bad is what each rule must find fault with, and what it must say.
var bad = []struct {
	rule string
	tree tree
	want string
}{
	{"imports", tree{"internal/lb/x.go": "package lb\nimport \"golang.org/x/sys/unix\"\n"}, "internal/lb/x.go imports golang.org/x/sys/unix"},
	{"imports", tree{"internal/route/x.go": "package route\nimport \"fairlead.dev/fairlead/internal/dataplane\"\n"}, "imports fairlead.dev/fairlead/internal/dataplane"},
	{"imports", tree{"internal/dataplane/x.go": "package dataplane\nimport \"k8s.io/api/core/v1\"\n"}, "imports k8s.io/api/core/v1"},
	{"imports", tree{"internal/agent/x.go": "package agent\nimport \"fairlead.dev/fairlead/internal/testnet\"\n"}, "for tests and the demo"},
	{"imports", tree{"cmd/fairlead/x.go": "package main\nimport \"fairlead.dev/fairlead/internal/testnet\"\n"}, "for tests and the demo"},
	{"imports", tree{"internal/novel/x.go": "package novel\n"}, "internal/novel is not in the table"},
	{"goroutines", tree{"internal/agent/x.go": "package agent\nfunc f() {\n\tgo f()\n}\n"}, "internal/agent/x.go:3:2 starts a goroutine"},
	{"goroutines", tree{"cmd/fairlead/x.go": "package main\nfunc f() { var wg sync.WaitGroup; wg.Go(f) }\n"}, "starts a goroutine"},
	{"package comments", tree{"internal/lb/x.go": "package lb\n"}, "internal/lb has 0 package comments"},
	{"package comments", tree{"internal/lb/x.go": "// Package lb is.\npackage lb\n", "internal/lb/y.go": "// Package lb was.\npackage lb\n"}, "internal/lb has 2 package comments"},
	{"package names", tree{"internal/util/x.go": "package util\n"}, "directory named util"},
	{"lengths", tree{"x.go": "package x\n" + strings.Repeat("\n", fileLines)}, "x.go has 601 lines"},
	{"lengths", tree{"x.go": "package x\nfunc long() {" + strings.Repeat("\n", functionLines) + "}\n"}, "long has 101 lines"},
	{"lengths", tree{"bpf/x.h": "static int f(void)\n{" + strings.Repeat("\n", functionLines) + "}\n"}, "bpf/x.h:2: function has 101 lines"},
	{"licences", tree{"x.go": "package x\n"}, "x.go does not begin with"},
	{"licences", tree{"bpf/x.h": "/* SPDX-License-Identifier: GPL-2.0 */\n"}, "bpf/x.h does not begin with"},
	{"licences", tree{"bpf/x.c": "// SPDX-License-Identifier: Apache-2.0\n"}, "bpf/x.c does not begin with"},
	{"licences", tree{"scripts/x.sh": "#!/bin/sh\necho\n"}, "scripts/x.sh does not begin with"},
	{"unfinished", tree{"x.go": goHead + "package x // TODO: the rest\n"}, `x.go:3 says "TODO"`},
	{"unfinished", tree{"README.md": "BGP is not yet implemented.\n"}, `README.md:1 says "not yet implemented"`},
	{"drop reasons", tree{contract: "\tDROP_TTL = 8,\n", "internal/dataplane/x_test.go": "DROP_TTL"}, "docs/drops.md does not mention DROP_TTL"},
	{"drop reasons", tree{contract: "\tDROP_TTL = 8,\n", "docs/drops.md": "DROP_TTL", "internal/dataplane/x_test.go": "DROP_TTL_X NO_DROP_TTL"}, "no test of the dataplane mentions DROP_TTL"},
	{"contract form", tree{contract: "struct a {\n\tunion {\n\t\t__u8 b;\n\t};\n};\n"}, "has a union"},
	{"contract form", tree{contract: "struct a {\n\t__u8 b : 1;\n};\n"}, "bit-field"},
	{"contract form", tree{contract: "struct a {\n\t__u8 b;\n\t__u32 c;\n};\n"}, "padding before c is not spelled out"},
	{"contract form", tree{contract: "struct a {\n\t__u32 b;\n\t__u8 c[3];\n};\n"}, "padding at its end is not spelled out"},
	{"contract form", tree{contract: "struct a {\n\tlong b;\n};\n"}, "cannot tell the size of long b"},
	{"contract sizes", tree{contract: "#define N 3\nstruct a_b {\n\t__u64 c[N];\n};\n", contracts: "package x\ntype bpfAB struct {\n\tC [2]uint64\n}\n"}, "struct a_b has 24 bytes in C, bpfAB has 16 in Go"},
	{"contract sizes", tree{contract: "struct a {\n\t__u8 b;\n};\n"}, "has no type of"},
	{"dependencies", tree{"go.mod": "require example.org/a v1.0.0\n", "x.go": "package x\nimport \"example.org/a/b\"\n"}, "does not name example.org/a"},
	{"dependencies", tree{"go.mod": "require example.org/a v1.0.0\n", "docs/dependencies.md": "| `example.org/a` | MIT | none |\n"}, "names example.org/a, which nothing uses"},
	{"commands", tree{}, "README.md is missing"},
	{"commands", tree{"README.md": "Run `make fly`.\n", "Makefile": "build:\n"}, "no target for make fly"},
	{"commands", tree{"README.md": "    sudo bin/fairlead fly\n", "cmd/fairlead/x.go": "Use: \"agent\""}, "no subcommand fairlead fly"},
}

// TestRulesCanFail shows each rule what it exists to refuse.
func TestRulesCanFail(t *testing.T) {
	for _, r := range rules {
		shown := 0
		for _, b := range bad {
			if b.rule != r.name {
				continue
			}
			shown++
			found := r.check(b.tree)
			if !slices.ContainsFunc(found, func(violation string) bool { return strings.Contains(violation, b.want) }) {
				t.Errorf("%s: found %q, want one with %q", r.name, found, b.want)
			}
		}
		if shown == 0 {
			t.Errorf("%s: no bad input shows that it can fail", r.name)
		}
	}
}
