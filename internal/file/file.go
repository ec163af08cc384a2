// SPDX-License-Identifier: Apache-2.0

// Package file reads Kubernetes' and Fairlead's objects from YAML files, for
// running without Kubernetes: strictly, with a finding for all that is wrong.
package file

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"fairlead.dev/fairlead/internal/lb"
)

// largest is the most that one file may hold, in bytes.
const largest = 64 << 20

// Load reads files, and the *.yaml, *.yml and *.json of directories. Any
// finding of severity Error means that the snapshot must not be used.
func Load(paths []string) (lb.Snapshot, []lb.Finding) {
	l := &loader{seen: map[string]*object{}}
	for _, path := range paths {
		for _, name := range l.expand(path) {
			l.read(name)
		}
	}
	s := l.snapshot()
	slices.SortStableFunc(l.findings, func(a, b lb.Finding) int {
		if c := strings.Compare(a.File, b.File); c != 0 {
			return c
		}
		return a.Line - b.Line
	})
	return s, l.findings
}

// Failed reports whether any finding is an error.
func Failed(findings []lb.Finding) bool {
	return slices.ContainsFunc(findings, func(f lb.Finding) bool { return f.Severity == lb.Error })
}

type loader struct {
	objects  []*object
	seen     map[string]*object
	findings []lb.Finding
}

// expand lists the files of a path, in order. Hidden files are left out:
// editors' and ConfigMaps' own.
func (l *loader) expand(path string) []string {
	info, err := os.Stat(path)
	if err != nil {
		l.fail(unreadable, path, 0, "%v", err)
		return nil
	}
	if !info.IsDir() {
		return []string{path}
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		l.fail(unreadable, path, 0, "%v", err)
		return nil
	}
	var names []string
	for _, entry := range entries {
		name := entry.Name()
		if strings.HasPrefix(name, ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name)) {
			continue
		}
		names = append(names, filepath.Join(path, name))
	}
	return names
}

func (l *loader) fail(rule *lb.Rule, file string, line int, format string, args ...any) {
	f := rule.At("file", "", format, args...)
	f.File, f.Line = file, line
	l.findings = append(l.findings, f)
}

func (l *loader) read(name string) {
	file, err := os.Open(name)
	if err != nil {
		l.fail(unreadable, name, 0, "%v", err)
		return
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, largest+1))
	if err != nil {
		l.fail(unreadable, name, 0, "%v", err)
		return
	}
	if len(text) > largest {
		l.fail(tooLarge, name, 0, "more than %d bytes", largest)
		return
	}
	l.parse(name, text)
}

// parse takes the documents of a file apart. It never panics, whatever the
// text: the YAML library is known to, so what it throws is a finding too.
func (l *loader) parse(name string, text []byte) {
	defer func() {
		if p := recover(); p != nil {
			l.fail(notYAML, name, 0, "%v", p)
		}
	}()
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for {
		var document yaml.Node
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			l.fail(notYAML, name, 0, "%v", err)
			return
		}
		for _, node := range document.Content {
			l.add(name, node)
		}
	}
}

// header is what says which kind of object a node is.
type header struct{ apiVersion, kind, namespace, name string }

func readHeader(node *yaml.Node) (h header) {
	h.apiVersion, h.kind = scalar(node, "apiVersion"), scalar(node, "kind")
	if metadata := child(node, "metadata"); metadata != nil {
		h.namespace, h.name = scalar(metadata, "namespace"), scalar(metadata, "name")
	}
	return h
}

func child(node *yaml.Node, key string) *yaml.Node {
	for i := 0; i+1 < len(node.Content) && node.Kind == yaml.MappingNode; i += 2 {
		if node.Content[i].Value == key {
			return node.Content[i+1]
		}
	}
	return nil
}

func scalar(node *yaml.Node, key string) string {
	if c := child(node, key); c != nil && c.Kind == yaml.ScalarNode {
		return c.Value
	}
	return ""
}

// add takes an object, or each item of a list.
func (l *loader) add(file string, node *yaml.Node) {
	if node.Kind == yaml.ScalarNode && node.Tag == "!!null" {
		return // an empty document
	}
	if node.Kind != yaml.MappingNode {
		l.fail(notYAML, file, node.Line, "an object is wanted")
		return
	}
	h := readHeader(node)
	if items := child(node, "items"); strings.HasSuffix(h.kind, "List") && (items == nil || items.Kind == yaml.SequenceNode) {
		l.addList(file, h, items)
		return
	}
	o := &object{file: file, line: node.Line, kind: h.apiVersion + " " + h.kind, node: node, lines: map[string]int{}, out: &l.findings}
	o.name = h.kind + " " + h.name
	if namespaced[o.kind] {
		if h.namespace == "" {
			h.namespace = "default"
		}
		o.name = fmt.Sprintf("%s %s/%s", h.kind, h.namespace, h.name)
	}
	switch {
	case kinds[o.kind] == nil:
		o.find(unknownKind, "kind", "%s of %q", h.kind, h.apiVersion)
	case h.name == "":
		o.find(noName, "metadata.name", "the object of this line has no name")
	case l.seen[o.name] != nil:
		o.find(duplicate, "metadata.name", "also in %s, line %d", l.seen[o.name].file, l.seen[o.name].line)
	default:
		l.seen[o.name] = o
		l.objects = append(l.objects, o)
	}
}

// addList adds the items of a List, or of a list of one kind, whose items need
// not say theirs.
func (l *loader) addList(file string, h header, items *yaml.Node) {
	if items == nil {
		return
	}
	for _, item := range items.Content {
		if own := strings.TrimSuffix(h.kind, "List"); own != "" && item.Kind == yaml.MappingNode {
			setDefault(item, "kind", own)
			setDefault(item, "apiVersion", h.apiVersion)
		}
		l.add(file, item)
	}
}

func setDefault(node *yaml.Node, key, value string) {
	if child(node, key) == nil {
		node.Content = append(node.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key, Line: node.Line},
			&yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value, Line: node.Line})
	}
}
