// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"

	"fairlead.dev/fairlead/internal/need"
)

// The verifier of each kernel accepts the program in every role, and has as
// much again to spare of the million instructions that it walks at most.
func TestVerifierCost(t *testing.T) {
	need.Root(t)
	processed := regexp.MustCompile(`processed (\d+) insns`)
	for _, config := range []bpfConfig{{Lb: 1}, {Lb: 1, Backend: 1, Cookies: 1, NatFirst: 61000, NatPorts: 4536, Nat4Count: 1, Nat6Count: 8}, {Backend: 1}, {Lb: 1, Backend: 1}, {Lb: 1, Backend: 1, Tracing: 1}} {
		spec, err := loadBpf()
		if err != nil {
			t.Fatal(err)
		}
		config.Node4, config.Node6 = wireAddr(node4), wireAddr(node6)
		if err := spec.Variables["config"].Set(config); err != nil {
			t.Fatal(err)
		}
		collection, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
			Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
		if err != nil {
			t.Fatalf("%+v", err)
		}
		for name, program := range collection.Programs {
			what := fmt.Sprintf("%s, lb %d, backend %d, tracing %d", name, config.Lb, config.Backend, config.Tracing)
			match := processed.FindStringSubmatch(program.VerifierLog)
			if match == nil {
				t.Fatalf("%s: no figure in %q", what, program.VerifierLog)
			}
			t.Logf("%s: %s instructions walked", what, match[1])
			if n, err := strconv.Atoi(match[1]); err != nil || n > 500_000 {
				t.Errorf("%s: %s instructions walked, more than half of the limit", what, match[1])
			}
		}
		collection.Close()
	}
}
