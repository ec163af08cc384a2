// SPDX-License-Identifier: Apache-2.0

package need

import (
	"testing"
)

// recorder notes how a test ended instead of ending it.
type recorder struct {
	testing.TB
	skipped, failed bool
}

func (r *recorder) Helper()      {}
func (r *recorder) Skip(...any)  { r.skipped = true }
func (r *recorder) Fatal(...any) { r.failed = true }

func TestMissingTool(t *testing.T) {
	const none = "no-such-tool-of-fairlead"
	t.Setenv(Variable, "")
	var r recorder
	Tool(&r, none)
	if !r.skipped || r.failed {
		t.Errorf("without %s: skipped %v, failed %v; want a skip", Variable, r.skipped, r.failed)
	}
	t.Setenv(Variable, "1")
	r = recorder{}
	Tool(&r, none)
	if r.skipped || !r.failed {
		t.Errorf("with %s=1: skipped %v, failed %v; want a failure", Variable, r.skipped, r.failed)
	}
}

func TestPresentTool(t *testing.T) {
	t.Setenv(Variable, "1")
	var r recorder
	if path := Tool(&r, "sh"); path == "" || r.skipped || r.failed {
		t.Errorf("sh: path %q, skipped %v, failed %v", path, r.skipped, r.failed)
	}
}
