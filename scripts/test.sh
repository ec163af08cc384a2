#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs every check and test: scripts/test.sh [lint|unit|race|e2e|kernels|fuzz]...
# Prints what runs, and at the end one line with the sum. A test that is
# skipped makes it fail: nothing is left out in silence.
set -euo pipefail
cd "$(dirname "$0")/.."
export FAIRLEAD_TEST_ALL=1

groups=("$@")
((${#groups[@]})) || groups=(lint unit race e2e kernels fuzz)

if ((EUID)) && [[ ${groups[*]} != lint ]]; then
	echo "The tests make namespaces and load BPF programs, which needs root. Run: sudo env PATH=\"\$PATH\" make test" >&2
	exit 1
fi
((EUID)) || scripts/install.sh

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
counts=$work/counts
touch "$counts"
go build -o "$work/report" ./test/report

title() { printf '\n== %s (%(%H:%M:%S)T)\n' "$1" -1; }

# check NAME COMMAND... counts a command as one test.
check() {
	title "$1"
	if "${@:2}"; then
		echo "1 0 0" >>"$counts"
	else
		echo "FAIL: $1"
		echo "0 1 0" >>"$counts"
	fi
}

# tests NAME COMMAND... counts the tests that a command reports as JSON.
tests() {
	title "$1"
	{ "${@:2}" || true; } | "$work/report" -counts "$counts" "${report_flags[@]}" || true
}
report_flags=()

no_output() {
	local out
	if ! out=$("$@") || [[ -n $out ]]; then
		echo "$out"
		return 1
	fi
}

lint() {
	check "build with Go alone" make --silent build
	check "gofmt" no_output gofmt -l .
	check "go vet" go vet ./...
	check "staticcheck" go tool staticcheck ./...
	check "go mod tidy" go mod tidy -diff
	check "shellcheck" shellcheck scripts/*.sh .ci/run
	check "clang warnings" scripts/warnings.sh
	check "clang-format" clang-format-19 --dry-run --Werror bpf/*.[ch]
	check "generated code" scripts/generated.sh
}

unit() {
	local packages
	mapfile -t packages < <(go list ./... | grep --invert-match --extended-regexp '/test/(e2e|kernels)$')
	tests "tests of every package" go test -json -count=1 -timeout 10m "${packages[@]}"
}

# Where threads meet.
race() {
	tests "tests with the race detector" go test -json -race -count=1 -timeout 10m \
		./internal/run ./internal/status ./internal/agent ./internal/file ./internal/route
}

e2e() { tests "end to end" go test -json -count=1 -timeout 15m ./test/e2e/...; }

kernels() {
	report_flags=(-v)
	tests "the dataplane on other kernels" go test -json -count=1 -timeout 60m ./test/kernels \
		-guestrun '^Test(Forward|Drop|Deliver|Deny|AskInTurn|OrdersInAContest|Unowned|Denied|Candidates|Forged|Handshake|AnswerUDP|Tunnel|ECN|ICMP|Echo|TimeExceeded|TooBig|ErrorAbout|FlowConflict|PodMay|NotFor|VerifierCost|Blind|Replayed|NAT|SourceRanges|LimitsOf|LimitForgets|AffinityOf|AskAbout|CookieThreshold|CookieWithoutAWay|CookieOfOld|CookieLetsThrough)' -limit 25m
	report_flags=()
}

fuzz() { tests "fuzz targets, 10 s each" scripts/fuzz.sh 10s; }

for group in "${groups[@]}"; do "$group"; done

awk '{ passed += $1; failed += $2; skipped += $3 }
	END {
		printf "\n%d passed, %d failed, %d skipped\n", passed, failed, skipped
		exit failed + skipped > 0 || passed == 0
	}' "$counts"
