// SPDX-License-Identifier: Apache-2.0

package file

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"

	"go.yaml.in/yaml/v3"

	"fairlead.dev/fairlead/internal/lb"
)

// object is one object of a file, with the lines of its fields.
type object struct {
	file  string
	line  int
	kind  string // with apiVersion: "v1 Service"
	name  string // "Service default/web"
	node  *yaml.Node
	lines map[string]int // by path, e.g. "spec.ports[0].port"
	out   *[]lb.Finding
}

// find notes a finding about a field of the object.
func (o *object) find(rule *lb.Rule, field, format string, args ...any) {
	f := rule.At(o.name, field, format, args...)
	f.File, f.Line = o.file, o.lineOf(field)
	*o.out = append(*o.out, f)
}

// lineOf is the line of a field, or of the nearest one around it.
func (o *object) lineOf(field string) int {
	for field != "" {
		if line, ok := o.lines[field]; ok {
			return line
		}
		field = field[:max(0, strings.LastIndexAny(field, ".["))]
	}
	return o.line
}

// into decodes the object, strictly, and returns whether it could be.
func (o *object) into(value any) bool {
	before := len(*o.out)
	o.walk(o.node, reflect.TypeOf(value).Elem(), "")
	if len(*o.out) > before {
		return false
	}
	var plain any
	if err := o.node.Decode(&plain); err != nil {
		o.find(notYAML, "", "%v", err)
		return false
	}
	text, err := json.Marshal(plain)
	if err == nil {
		err = json.Unmarshal(text, value)
	}
	var wrong *json.UnmarshalTypeError
	switch {
	case errors.As(err, &wrong):
		o.find(wrongType, wrong.Field, "%s where %s is wanted", wrong.Value, wrong.Type)
	case err != nil:
		o.find(wrongType, "", "%v", err)
	}
	return err == nil
}

// walk notes the lines of all fields, and finds those that the type does not
// have.
func (o *object) walk(node *yaml.Node, t reflect.Type, path string) {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if path != "" {
		o.lines[path] = node.Line
	}
	if t != nil && (decodesItself(t) || t.Kind() == reflect.Interface) {
		t = nil
	}
	switch node.Kind {
	case yaml.MappingNode:
		o.walkMapping(node, t, path)
	case yaml.SequenceNode:
		var element reflect.Type
		if t != nil && t.Kind() == reflect.Slice {
			element = t.Elem()
		}
		for i, child := range node.Content {
			o.walk(child, element, fmt.Sprintf("%s[%d]", path, i))
		}
	case yaml.AliasNode:
		o.find(hasAlias, path, "*%s", node.Value)
	}
	if node.Anchor != "" {
		o.find(hasAlias, path, "&%s", node.Anchor)
	}
}

func (o *object) walkMapping(node *yaml.Node, t reflect.Type, path string) {
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		key, child := node.Content[i].Value, node.Content[i+1]
		at := strings.TrimPrefix(path+"."+key, ".")
		o.lines[at] = node.Content[i].Line
		if seen[key] {
			o.find(duplicateKey, at, "%q stands twice", key)
		}
		seen[key] = true
		var field reflect.Type
		if t != nil && t.Kind() == reflect.Map {
			field = t.Elem()
		}
		if t != nil && t.Kind() == reflect.Struct {
			found, ok := fieldType(t, key)
			if !ok {
				o.find(unknownField, at, "there is no field %q", key)
				continue
			}
			field = found
		}
		o.walk(child, field, at)
		o.lines[at] = node.Content[i].Line
	}
}

var unmarshaler = reflect.TypeFor[json.Unmarshaler]()

func decodesItself(t reflect.Type) bool { return reflect.PointerTo(t).Implements(unmarshaler) }

// fieldType finds the field with a JSON name, also in embedded structs.
func fieldType(t reflect.Type, name string) (reflect.Type, bool) {
	for i := range t.NumField() {
		f := t.Field(i)
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if f.Anonymous && (tag == "" || strings.Contains(options, "inline")) {
			if found, ok := fieldType(f.Type, name); ok {
				return found, true
			}
			continue
		}
		if tag == name {
			return f.Type, true
		}
	}
	return nil, false
}
