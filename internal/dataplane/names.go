// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"strings"
	"sync"

	"github.com/cilium/ebpf/btf"
)

// The names of reasons and events come from the compiled programs' own type
// information, so that they stand in bpf/reasons.h alone.
var names = sync.OnceValues(func() (enums map[string][]string, err error) {
	spec, err := loadBpf()
	if err != nil {
		return nil, err
	}
	enums = map[string][]string{}
	for name, prefix := range map[string]string{"drop": "DROP_", "event": "EVENT_"} {
		var enum *btf.Enum
		if err := spec.Types.TypeByName(name, &enum); err != nil {
			return nil, err
		}
		enums[name] = enumNames(enum, prefix)
	}
	return enums, nil
})

// enumNames are the values' names without prefix, in lower case, by number;
// unused numbers, 0 (nothing) and the bound itself are "".
func enumNames(enum *btf.Enum, prefix string) []string {
	var all []string
	for _, value := range enum.Values {
		name := strings.ToLower(strings.TrimPrefix(value.Name, prefix))
		for len(all) <= int(value.Value) {
			all = append(all, "")
		}
		if value.Value != 0 && name != "max" {
			all[value.Value] = name
		}
	}
	return all
}

// DropNames are the names of all drop reasons by number, as in bpf/reasons.h
// without the prefix and in lower case; unused numbers are "".
func DropNames() []string { return enumsNamed("drop") }

// EventNames is the same for events.
func EventNames() []string { return enumsNamed("event") }

func enumsNamed(name string) []string {
	enums, err := names()
	if err != nil {
		panic("dataplane: the embedded programs have no type information: " + err.Error())
	}
	return enums[name]
}
