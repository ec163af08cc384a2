// SPDX-License-Identifier: Apache-2.0

package fairlead

import (
	"fmt"
	"go/ast"
	"path"
	"regexp"
	"slices"
	"strings"
)

// startGoroutines are the packages that may, with why.
var startGoroutines = map[string]string{
	"internal/run":     "it is its purpose",
	"internal/testnet": "programs of tests and of the demo, each with one life",
	"internal/demo":    "as testnet",
}

func checkGoroutines(t tree) []string {
	var violations []string
	for _, name := range t.ours(false) {
		if _, ok := startGoroutines[path.Dir(name)]; ok || strings.HasPrefix(name, "test/") {
			continue
		}
		file, fset := t.parse(name)
		ast.Inspect(file, func(n ast.Node) bool {
			if startsGoroutine(n) {
				violations = append(violations, fmt.Sprintf("%s starts a goroutine", fset.Position(n.Pos())))
			}
			return true
		})
	}
	return violations
}

// startsGoroutine sees go statements, and WaitGroup.Go and errgroup's.
func startsGoroutine(n ast.Node) bool {
	switch n := n.(type) {
	case *ast.GoStmt:
		return true
	case *ast.CallExpr:
		method, ok := n.Fun.(*ast.SelectorExpr)
		return ok && method.Sel.Name == "Go"
	}
	return false
}

func checkPackageComments(t tree) []string {
	comments := map[string]int{}
	for _, name := range t.ours(true) {
		file, _ := t.parse(name)
		dir := path.Dir(name)
		if strings.HasSuffix(file.Name.Name, "_test") {
			continue // belongs to the package that it tests
		}
		comments[dir] += 0
		if file.Doc != nil {
			comments[dir]++
		}
	}
	var violations []string
	for dir, n := range comments {
		if n != 1 {
			violations = append(violations, fmt.Sprintf("%s has %d package comments, want one", dir, n))
		}
	}
	slices.Sort(violations)
	return violations
}

var emptyNames = []string{"util", "utils", "common", "types", "helper", "helpers", "misc", "base", "shared", "pkg", "core"}

func checkPackageNames(t tree) []string {
	var violations []string
	for _, name := range t.ours(true) {
		for _, element := range strings.Split(path.Dir(name), "/") {
			if slices.Contains(emptyNames, element) {
				violations = append(violations, fmt.Sprintf("%s is in a directory named %s", name, element))
			}
		}
	}
	return violations
}

// The limits are wider than the aims, 500 and 60, so that reaching one is a
// question of design and not of formatting.
const (
	fileLines     = 600
	functionLines = 100
)

func checkLengths(t tree) []string {
	var violations []string
	for _, name := range append(t.ours(true), t.c()...) {
		if n := strings.Count(t[name], "\n"); n > fileLines {
			violations = append(violations, fmt.Sprintf("%s has %d lines, more than %d", name, n, fileLines))
		}
	}
	for _, name := range t.ours(true) {
		file, fset := t.parse(name)
		for _, declaration := range file.Decls {
			function, ok := declaration.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n := fset.Position(function.End()).Line - fset.Position(function.Pos()).Line + 1
			if n > functionLines {
				violations = append(violations, fmt.Sprintf("%s: %s has %d lines, more than %d", name, function.Name.Name, n, functionLines))
			}
		}
	}
	for _, name := range t.c() {
		violations = append(violations, longFunctionsInC(name, t[name])...)
	}
	return violations
}

// longFunctionsInC relies on kernel style: a function's braces, and no
// others, stand alone in the first column.
func longFunctionsInC(name, source string) []string {
	var violations []string
	start := 0
	for i, line := range strings.Split(source, "\n") {
		switch {
		case line == "{":
			start = i + 1
		case line == "}" && start > 0:
			if n := i + 2 - start; n > functionLines {
				violations = append(violations, fmt.Sprintf("%s:%d: function has %d lines, more than %d", name, start, n, functionLines))
			}
			start = 0
		}
	}
	return violations
}

func checkLicences(t tree) []string {
	var violations []string
	want := func(extension, line string, within int) {
		for _, name := range t.matching(func(name string) bool { return path.Ext(name) == extension && !generated(t[name]) }) {
			head := strings.SplitN(t[name], "\n", within+1)
			if !slices.Contains(head[:min(within, len(head))], line) {
				violations = append(violations, fmt.Sprintf("%s does not begin with %q", name, line))
			}
		}
	}
	want(".go", "// SPDX-License-Identifier: Apache-2.0", 1)
	// As the kernel does, which once had tools that choked on the other form.
	want(".h", "/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */", 1)
	want(".c", "// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause", 1)
	want(".sh", "# SPDX-License-Identifier: Apache-2.0", 2)
	return violations
}

var unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b|(?i)\b(not (yet )?implemented|coming soon|placeholder for)\b`)

func checkUnfinished(t tree) []string {
	var violations []string
	for _, name := range t.matching(func(name string) bool { return !strings.HasPrefix(name, "rules_") }) {
		for i, line := range strings.Split(t[name], "\n") {
			if word := unfinished.FindString(line); word != "" {
				violations = append(violations, fmt.Sprintf("%s:%d says %q", name, i+1, word))
			}
		}
	}
	return violations
}
