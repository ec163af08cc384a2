# SPDX-License-Identifier: Apache-2.0
#
# `make help` lists what there is. Longer steps are in scripts/.

SHELL := /bin/bash
GO ?= go
# What git says, for `fairlead version`; a tree without git has no version.
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

BENCH ?= BenchmarkPacket
BENCHTIME ?= 0.3s

# The version is told by VERSION; Go's own stamp fails in a clone that belongs
# to another user.
export GOFLAGS := -buildvcs=false $(GOFLAGS)

.DEFAULT_GOAL := build

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build bin/fairlead; needs nothing but Go
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/fairlead ./cmd/fairlead

.PHONY: generate
generate: ## Compile the BPF programs and generate their Go types; needs clang-19
	$(GO) generate ./...

.PHONY: test
test: ## Install what is missing and run every check and test; needs root
	@scripts/test.sh

.PHONY: lint
lint: ## Run the checks alone: formats, vet, staticcheck, warnings, generated code
	@scripts/test.sh lint

.PHONY: e2e
e2e: ## Run the end-to-end tests in namespaces; needs root
	@scripts/test.sh e2e

.PHONY: test-kernels
test-kernels: ## Run the dataplane's tests on Debian's kernels 6.1 and 6.12 in QEMU
	@scripts/test.sh kernels

.PHONY: demo
demo: build ## Show Fairlead at work in a throwaway network; needs root
	bin/fairlead demo

.PHONY: bench
bench: ## Run every benchmark and print a table; needs root
	@$(GO) run ./test/bench

.PHONY: bench-packet
bench-packet: ## Time packets alone: BENCH=regexp BENCHTIME=0.3s; needs root
	@$(GO) run ./test/bench -group packet -bench '$(BENCH)' -benchtime '$(BENCHTIME)'

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin
