// SPDX-License-Identifier: Apache-2.0

// Package need says what a test needs of the machine. A test that lacks it is
// skipped, but fails where everything must run (FAIRLEAD_TEST_ALL=1), so that
// nothing is skipped in silence.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// Variable is set to 1 by the command that must run every test.
const Variable = "FAIRLEAD_TEST_ALL"

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "needs root")
	}
}

// Tool needs an executable and returns its path.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, "needs "+name+": "+err.Error())
	}
	return path
}

func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv(Variable) == "1" {
		t.Fatal(what)
	} else {
		t.Skip(what)
	}
}
