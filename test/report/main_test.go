// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	tests := []struct {
		name                    string
		events                  string
		passed, failed, skipped int
		says                    string
	}{
		{
			name: "leaves are counted, not their parents",
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"run","Package":"p","Test":"A/two"}
{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"pass","Package":"p","Test":"A/two"}
{"Action":"pass","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`,
			passed: 2, says: "ok   p",
		},
		{
			name: "a failure below a test counts once and shows its output",
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"output","Package":"p","Test":"A/one","Output":"    x_test.go:1: want 1\n"}
{"Action":"fail","Package":"p","Test":"A/one"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`,
			failed: 1, says: "want 1",
		},
		{
			name: "a test that fails though its subtests pass is a failure",
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"run","Package":"p","Test":"A/one"}
{"Action":"pass","Package":"p","Test":"A/one"}
{"Action":"fail","Package":"p","Test":"A"}
{"Action":"fail","Package":"p"}`,
			passed: 1, failed: 1, says: "FAIL p A",
		},
		{
			name: "what is skipped is named with its reason",
			events: `{"Action":"run","Package":"p","Test":"A"}
{"Action":"output","Package":"p","Test":"A","Output":"    x_test.go:1: needs root\n"}
{"Action":"skip","Package":"p","Test":"A"}
{"Action":"pass","Package":"p"}`,
			skipped: 1, says: "needs root",
		},
		{
			name: "a package that does not compile is a failure",
			events: `{"Action":"build-output","ImportPath":"p","Output":"undefined: x\n"}
{"Action":"fail","Package":"p","FailedBuild":"p"}`,
			failed: 1, says: "undefined: x",
		},
		{
			name:   "a line that is no event is shown",
			events: "go: no such tool",
			says:   "no such tool",
		},
		{
			name:   "a package without tests counts for nothing",
			events: `{"Action":"skip","Package":"p"}`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out strings.Builder
			r := newReporter(&out, false)
			if err := r.read(strings.NewReader(tt.events + "\n")); err != nil {
				t.Fatal(err)
			}
			if r.passed != tt.passed || r.failed != tt.failed || r.skipped != tt.skipped {
				t.Errorf("passed, failed, skipped = %d, %d, %d, want %d, %d, %d",
					r.passed, r.failed, r.skipped, tt.passed, tt.failed, tt.skipped)
			}
			if !strings.Contains(out.String(), tt.says) {
				t.Errorf("said %q, want %q in it", out.String(), tt.says)
			}
		})
	}
}
