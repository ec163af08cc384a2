// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"os/exec"
	"strings"
	"testing"

	"fairlead.dev/fairlead/internal/need"
)

// The scenes that newcomers watch check their own claims.
func TestDemoScenes(t *testing.T) {
	need.Root(t)
	for scene, last := range map[string]string{"first-light": "first-light: 1200/1200", "rollout": "rollout: 0 of 500 connections broken",
		"health": "health: a Pod that fails", "flood": "flood: "} {
		out, err := exec.Command(binary, "demo", scene).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		if err != nil || !strings.HasPrefix(lines[len(lines)-1], last) {
			t.Errorf("%s: %v\n%s", scene, err, out)
		}
	}
}
