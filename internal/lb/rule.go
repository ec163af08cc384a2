// SPDX-License-Identifier: Apache-2.0

package lb

import "fmt"

// Rule is one kind of Finding.
type Rule struct {
	Code     string // stable, never reused
	Severity Severity
	Title    string // what is wrong, in general
	Remedy   string // what to do about it
}

// At returns a Finding of this rule about a field of an object.
func (r *Rule) At(object, field, format string, args ...any) Finding {
	return Finding{
		Code: r.Code, Severity: r.Severity, Object: object, Field: field,
		Problem: fmt.Sprintf(format, args...), Remedy: r.Remedy,
	}
}
