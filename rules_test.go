// SPDX-License-Identifier: Apache-2.0

// Package fairlead holds the rules of this repository, as tests. A rule that
// is only written down is not kept.
package fairlead

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"testing"
)

// A rule finds what is wrong with the tree. Each violation names its place.
type rule struct {
	name   string
	reason string
	check  func(tree) []string
}

var rules = []rule{
	{"imports", "decisions stay free of I/O, and edges free of each other, only if nobody imports what is convenient", checkImports},
	{"goroutines", "only internal/run starts goroutines, so that all are stopped and none is forgotten", checkGoroutines},
	{"package comments", "a package that cannot be described in a sentence should be two", checkPackageComments},
	{"package names", "a name that fits everything says nothing", checkPackageNames},
	{"lengths", "one idea for each file and function", checkLengths},
	{"licences", "each file says under which licence it may be used", checkLicences},
	{"unfinished", "work that is promised in a comment is not done; do it or open an issue", checkUnfinished},
	{"drop reasons", "an operator must be able to look up why a packet was dropped, and a reason that no test reaches may be wrong", checkDropReasons},
	{"contract form", "C and Go agree on a layout only if the compiler adds nothing to it", checkContractForm},
	{"contract sizes", "Go's types are generated from the C header; generate them again", checkContractSizes},
	{"dependencies", "each dependency is a risk somebody took on purpose", checkDependencies},
	{"commands", "what the README tells people to run must exist", checkCommands},
}

func TestRules(t *testing.T) {
	repository, err := readTree(os.DirFS("."))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) {
			for _, violation := range r.check(repository) {
				t.Errorf("%s\n\tthe rule: %s", violation, r.reason)
			}
		})
	}
}

// A tree is the repository's text files by path.
type tree map[string]string

func readTree(fsys fs.FS) (tree, error) {
	files := tree{}
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name == ".git" || name == "bin" || d.Name() == "testdata" {
				return fs.SkipDir
			}
			return nil
		}
		if slices.Contains([]string{".go", ".c", ".h", ".sh", ".md", ".mod"}, path.Ext(name)) || name == "Makefile" {
			data, err := fs.ReadFile(fsys, name)
			files[name] = string(data)
			return err
		}
		return nil
	})
	return files, err
}

// matching returns the sorted paths for which want is true.
func (t tree) matching(want func(name string) bool) []string {
	var names []string
	for name := range t {
		if want(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// ours lists Go files written by hand, with or without tests.
func (t tree) ours(tests bool) []string {
	return t.matching(func(name string) bool {
		return path.Ext(name) == ".go" && !generated(t[name]) && (tests || !strings.HasSuffix(name, "_test.go"))
	})
}

// c lists the C files.
func (t tree) c() []string {
	return t.matching(func(name string) bool { return path.Ext(name) == ".c" || path.Ext(name) == ".h" })
}

func generated(source string) bool {
	for line := range strings.Lines(source) {
		if strings.HasPrefix(line, "package ") {
			return false
		}
		if strings.HasPrefix(line, "// Code generated") {
			return true
		}
	}
	return false
}

// parse returns a file's syntax; a file that has none is the compiler's
// concern, and has nothing that a rule could look at.
func (t tree) parse(name string) (*ast.File, *token.FileSet) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, t[name], parser.ParseComments)
	if err != nil {
		return &ast.File{Name: ast.NewIdent("_")}, fset
	}
	return file, fset
}
