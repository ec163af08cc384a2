// SPDX-License-Identifier: Apache-2.0

package main

import (
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	const raw = `goos: linux
BenchmarkPacket/tcp/v4-2   100   70.0 ns/packet   10.0 baseline-ns
BenchmarkBuild/10-2        5     1000 ns/op
BenchmarkPacket/notvip-2   100   12.5 ns/packet
PASS
BenchmarkPacket/tcp/v4-2   100   90.0 ns/packet   30.0 baseline-ns
BenchmarkPacket/tcp/v4-2   100   80.0 ns/packet   20.0 baseline-ns
`
	const want = `
Packet    ns/packet  baseline-ns
  tcp/v4  80         20
  notvip  12.5       -

Build  ns/op
  10   1000
`
	var out strings.Builder
	if err := table(&out, parse(raw)); err != nil {
		t.Fatal(err)
	}
	if out.String() != want {
		t.Errorf("table:\n%s\nwant:\n%s", out.String(), want)
	}
}
