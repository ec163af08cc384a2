// SPDX-License-Identifier: Apache-2.0

package dataplane

import (
	"fairlead.dev/fairlead/internal/slots"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// What Go repeats of bpf/fairlead.h is the same there.
func TestConstantsEqualC(t *testing.T) {
	header, err := os.ReadFile("../../bpf/fairlead.h")
	must(t, err)
	defined := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^#define ([A-Z0-9_]+) ([0-9a-fxULl]+)\b`).FindAllStringSubmatch(string(header), -1) {
		defined[m[1]] = strings.TrimRight(m[2], "UL")
	}
	for name, ours := range map[string]uint64{
		"LAYOUT_VERSION": layoutVersion, "SERVICE_NONE": serviceNone, "SERVICE_BITS_SHIFT": serviceBitsShift, "SLOT_CANDIDATES_SHIFT": candidatesShift,
		"CANDIDATES_MAX": slots.MaxCandidates, "STAND_INS_MAX": slots.StandIns,
		"SERVICE_FLAGS_SHIFT": serviceFlagsShift, "BACKEND_GENERATION_SHIFT": generationShift,
		"BACKEND_GENERATION_MASK": generationMask, "BACKEND_STATE_SHIFT": stateShift, "VIP_BITS_LOG2": vipBitsLog2,
		"VIP_BITS_MIX0": vipBitsMix0, "VIP_BITS_MIX1": vipBitsMix1, "POD_SERVES_MAX": podServesMax,
	} {
		theirs, err := strconv.ParseUint(defined[name], 0, 64)
		if err != nil || theirs != ours {
			t.Errorf("%s: %q in C (%v), %#x in Go", name, defined[name], err, ours)
		}
	}
}
