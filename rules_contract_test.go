// SPDX-License-Identifier: Apache-2.0

package fairlead

import (
	"fmt"
	"go/ast"
	"regexp"
	"strconv"
	"strings"
)

const (
	contract  = "bpf/fairlead.h"
	reasons   = "bpf/reasons.h" // a part of it
	contracts = "internal/dataplane/bpf_bpfel.go"
)

var (
	cComment = regexp.MustCompile(`(?s)/\*.*?\*/`)
	cDefine  = regexp.MustCompile(`(?m)^#define (\w+) (\d+)U?$`)
	cStruct  = regexp.MustCompile(`(?ms)^struct (\w+) \{\n(.*?)^\};`)
	cField   = regexp.MustCompile(`^\s*(struct \w+|\w+) (\w+)((?:\[\w+\])*);$`)
	cIndex   = regexp.MustCompile(`\[(\w+)\]`)
	cUnion   = regexp.MustCompile(`\bunion\b`)
	cBits    = regexp.MustCompile(`\b\w+ \w+ ?: ?\d+;`)
	dropName = regexp.MustCompile(`(?m)^\s*DROP_(\w+) = \d+,`)
)

func checkDropReasons(t tree) []string {
	var violations []string
	documented := t["docs/drops.md"]
	var tests strings.Builder
	for _, name := range t.matching(func(name string) bool {
		return strings.HasPrefix(name, "internal/dataplane/") && strings.HasSuffix(name, "_test.go")
	}) {
		tests.WriteString(t[name])
	}
	for _, match := range dropName.FindAllStringSubmatch((t[reasons] + t[contract]), -1) {
		name := match[1]
		if name == "NONE" || name == "MAX" {
			continue
		}
		if !regexp.MustCompile(`\b(DROP_` + name + `|` + strings.ToLower(name) + `)\b`).MatchString(documented) {
			violations = append(violations, fmt.Sprintf("docs/drops.md does not mention DROP_%s", name))
		}
		if !regexp.MustCompile(`(^|[^A-Z_])DROP_` + name + `\b`).MatchString(tests.String()) {
			violations = append(violations, fmt.Sprintf("no test of the dataplane mentions DROP_%s", name))
		}
	}
	return violations
}

// A layout is a type's size and alignment in bytes.
type layout struct{ size, align int }

// checkContractForm finds what would let the compiler choose a layout.
func checkContractForm(t tree) []string {
	source := cComment.ReplaceAllString((t[reasons] + t[contract]), "")
	var violations []string
	if cUnion.MatchString(source) {
		violations = append(violations, contract+" has a union")
	}
	if bits := cBits.FindString(source); bits != "" {
		violations = append(violations, fmt.Sprintf("%s has a bit-field: %s", contract, bits))
	}
	_, problems := layoutsOfC((t[reasons] + t[contract]))
	return append(violations, problems...)
}

// layoutsOfC computes the layout of each structure, and tells of padding that
// is not spelled out.
func layoutsOfC(source string) (map[string]layout, []string) {
	layouts := map[string]layout{
		"__u8": {1, 1}, "__u16": {2, 2}, "__be16": {2, 2}, "__u32": {4, 4}, "__be32": {4, 4}, "__s32": {4, 4},
		"__u64": {8, 8}, "__be64": {8, 8}, "struct bpf_timer": {16, 8}, "struct bpf_spin_lock": {4, 4},
	}
	numbers := map[string]int{}
	for _, match := range cDefine.FindAllStringSubmatch(source, -1) {
		numbers[match[1]], _ = strconv.Atoi(match[2]) // the expression matches digits alone
	}
	source = cComment.ReplaceAllString(source, "")
	var problems []string
	for _, match := range cStruct.FindAllStringSubmatch(source, -1) {
		name, whole := "struct "+match[1], layout{0, 1}
		for line := range strings.Lines(match[2]) {
			if strings.TrimSpace(line) == "" {
				continue
			}
			field := cField.FindStringSubmatch(strings.TrimRight(line, " \t\n"))
			if field == nil {
				problems = append(problems, fmt.Sprintf("%s: cannot tell the size of %q", name, strings.TrimSpace(line)))
				continue
			}
			one, known := layouts[field[1]]
			if !known {
				problems = append(problems, fmt.Sprintf("%s: cannot tell the size of %s %s", name, field[1], field[2]))
				continue
			}
			if whole.size%one.align != 0 {
				problems = append(problems, fmt.Sprintf("%s: padding before %s is not spelled out", name, field[2]))
			}
			whole = whole.with(layout{one.size * elements(field[3], numbers), one.align})
		}
		if whole.size%whole.align != 0 {
			problems = append(problems, fmt.Sprintf("%s: padding at its end is not spelled out", name))
		}
		layouts[name] = whole.end()
	}
	return layouts, problems
}

func elements(indices string, numbers map[string]int) int {
	n := 1
	for _, match := range cIndex.FindAllStringSubmatch(indices, -1) {
		if count, err := strconv.Atoi(match[1]); err == nil {
			n *= count
		} else {
			n *= numbers[match[1]]
		}
	}
	return n
}

// with appends a field.
func (l layout) with(field layout) layout {
	start := (l.size + field.align - 1) / field.align * field.align
	return layout{start + field.size, max(l.align, field.align)}
}

func (l layout) end() layout {
	return layout{(l.size + l.align - 1) / l.align * l.align, l.align}
}

// checkContractSizes compares the header with the types generated from it.
func checkContractSizes(t tree) []string {
	inC, _ := layoutsOfC((t[reasons] + t[contract]))
	file, _ := t.parse(contracts)
	inGo := map[string]ast.Expr{}
	ast.Inspect(file, func(n ast.Node) bool {
		if spec, ok := n.(*ast.TypeSpec); ok {
			inGo[spec.Name.Name] = spec.Type
		}
		return true
	})
	var violations []string
	compared := 0
	for name, want := range inC {
		structure, ok := strings.CutPrefix(name, "struct ")
		if !ok || inGo[goName(structure)] == nil {
			continue
		}
		compared++
		if got := layoutOfGo(inGo[goName(structure)], inGo).end(); got.size != want.size {
			violations = append(violations, fmt.Sprintf("%s has %d bytes in C, %s has %d in Go", name, want.size, goName(structure), got.size))
		}
	}
	if compared == 0 {
		violations = append(violations, fmt.Sprintf("%s has no type of %s", contracts, contract))
	}
	return violations
}

// goName is the name that bpf2go gives a type: service_key is bpfServiceKey.
func goName(structure string) string {
	name := "bpf"
	for _, word := range strings.Split(structure, "_") {
		name += strings.ToUpper(word[:1]) + word[1:]
	}
	return name
}

var basicLayouts = map[string]layout{
	"byte": {1, 1}, "uint8": {1, 1}, "int8": {1, 1}, "bool": {1, 1}, "uint16": {2, 2}, "int16": {2, 2},
	"uint32": {4, 4}, "int32": {4, 4}, "uint64": {8, 8}, "int64": {8, 8},
}

// layoutOfGo computes the layout of a type as generated: structures, arrays
// and integers. What is of another package (structs.HostLayout) is empty.
func layoutOfGo(expr ast.Expr, types map[string]ast.Expr) layout {
	switch e := expr.(type) {
	case *ast.Ident:
		if basic, ok := basicLayouts[e.Name]; ok {
			return basic
		}
		if named, ok := types[e.Name]; ok {
			return layoutOfGo(named, types)
		}
	case *ast.ArrayType:
		if length, ok := e.Len.(*ast.BasicLit); ok {
			n, err := strconv.Atoi(length.Value)
			element := layoutOfGo(e.Elt, types)
			if err == nil {
				return layout{n * element.size, element.align}
			}
		}
	case *ast.StructType:
		whole := layout{0, 1}
		for _, field := range e.Fields.List {
			for range max(1, len(field.Names)) {
				whole = whole.with(layoutOfGo(field.Type, types))
			}
		}
		return whole.end()
	}
	return layout{0, 1}
}
