// SPDX-License-Identifier: Apache-2.0

package fairlead

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

var (
	required  = regexp.MustCompile(`(?m)^(?:\t|require )([\w.-]+\.[\w./-]+) v\S+`)
	tool      = regexp.MustCompile(`(?m)^(?:\t|tool )([\w.-]+\.[\w./-]+)$`)
	tableRow  = regexp.MustCompile("(?m)^\\| `([^`]+)` \\|")
	makeUse   = regexp.MustCompile("(?m)(?:^\\s*(?:[$#] )?|`|&& |sudo )make ([a-z][a-z0-9-]*)")
	binaryUse = regexp.MustCompile("(?m)(?:^\\s*(?:[$#] )?|`|&& |sudo )(?:bin/)?fairlead ([a-z][a-z-]*)")
	target    = regexp.MustCompile(`(?m)^([a-z0-9-]+):`)
	cobraUse  = regexp.MustCompile(`Use:\s*"([a-z-]+)`)
)

// checkDependencies compares docs/dependencies.md with what the code imports
// and the tools that go.mod names.
func checkDependencies(t tree) []string {
	var modules []string
	for _, match := range required.FindAllStringSubmatch(t["go.mod"], -1) {
		modules = append(modules, match[1])
	}
	used := map[string]bool{}
	use := func(imported string) {
		longest := ""
		for _, module := range modules {
			if (imported == module || strings.HasPrefix(imported, module+"/")) && len(module) > len(longest) {
				longest = module
			}
		}
		if longest != "" {
			used[longest] = true
		}
	}
	for _, name := range t.matching(func(name string) bool { return path.Ext(name) == ".go" }) {
		file, _ := t.parse(name)
		for _, spec := range file.Imports {
			if imported, err := strconv.Unquote(spec.Path.Value); err == nil {
				use(imported)
			}
		}
	}
	for _, match := range tool.FindAllStringSubmatch(t["go.mod"], -1) {
		use(match[1])
	}
	var documented, violations []string
	for _, match := range tableRow.FindAllStringSubmatch(t["docs/dependencies.md"], -1) {
		documented = append(documented, match[1])
		if !used[match[1]] {
			violations = append(violations, fmt.Sprintf("docs/dependencies.md names %s, which nothing uses", match[1]))
		}
	}
	for module := range used {
		if !slices.Contains(documented, module) {
			violations = append(violations, fmt.Sprintf("docs/dependencies.md does not name %s", module))
		}
	}
	slices.Sort(violations)
	return violations
}

// checkCommands looks at lines and code that begin with a command.
func checkCommands(t tree) []string {
	exist := func(pattern *regexp.Regexp, names []string) []string {
		var found []string
		for _, name := range names {
			for _, match := range pattern.FindAllStringSubmatch(t[name], -1) {
				found = append(found, match[1])
			}
		}
		return found
	}
	targets := exist(target, []string{"Makefile"})
	subcommands := append(exist(cobraUse, t.matching(func(name string) bool {
		return path.Dir(name) == "cmd/fairlead"
	})), "completion", "help")
	var violations []string
	if t["README.md"] == "" {
		violations = append(violations, "README.md is missing")
	}
	for _, name := range []string{"README.md", "CONTRIBUTING.md"} {
		for _, match := range makeUse.FindAllStringSubmatch(t[name], -1) {
			if !slices.Contains(targets, match[1]) {
				violations = append(violations, fmt.Sprintf("%s: no target for make %s", name, match[1]))
			}
		}
		for _, match := range binaryUse.FindAllStringSubmatch(t[name], -1) {
			if !slices.Contains(subcommands, match[1]) {
				violations = append(violations, fmt.Sprintf("%s: no subcommand fairlead %s", name, match[1]))
			}
		}
	}
	return violations
}
