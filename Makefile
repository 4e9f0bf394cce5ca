# `make serve` and `make test` do all their set-up themselves, system packages
# included (tools/setup-system.sh). PYTHON=... names the interpreter for .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help serve test lint types check bench bench-nbd bench-img conformance iotests matrix \
 img-lines nbd-lines differential-long safety fuzz soak clean setup-serve setup-test

BIN := .venv/bin
IMAGE ?= var/disk.qcow2
LISTEN ?= 127.0.0.1:10809
PYTEST := $(BIN)/python -m pytest
# Tests wait for other programs now and then: one more than there are processors.
JOBS ?= $(shell echo $$(($$(nproc) + 1)))
PARALLEL := -n $(JOBS) --dist worksteal
# What runs at length takes longer than a test of `make test` may.
LONG := --timeout 7200 -o faulthandler_timeout=0
# By way of the environment the shell takes any name for what it is.
export PYTHON IMAGE LISTEN FORMAT

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | \
	    while IFS=$$'\t' read -r target text; do \
	        printf '  make %-18s %s\n' "$$target" "$$text"; done

serve: setup-serve  ## serve IMAGE=path [FORMAT=raw] on LISTEN=host:port (without IMAGE a new one)
	@if [ "$$IMAGE" = var/disk.qcow2 ] && ! [ -e var/disk.qcow2 ]; then \
	    mkdir -p var && $(BIN)/nbdqcow-img create -q -f qcow2 var/disk.qcow2 1G && \
	    echo "made var/disk.qcow2, an empty image of 1 GiB"; fi
	@exec $(BIN)/nbdqcow serve --listen "$$LISTEN" $${FORMAT:+--format "$$FORMAT"} -- "$$IMAGE"

test: setup-test  ## lint, types and every test but the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(PARALLEL) -m "not slow"

lint: setup-test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test  ## mypy --strict
	$(BIN)/mypy

check: setup-test  ## quick: lint, types, unit and block tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -q tests/unit $(wildcard tests/block)

bench: bench-nbd bench-img  ## the server and the image tool beside their peers

bench-nbd: setup-test  ## fio against this server and its peers (BENCH='--quick --cells ...')
	$(BIN)/python -m bench $(BENCH)

bench-img: setup-test  ## the image tool's commands beside qemu-img (BENCH_IMG='--scale ...')
	$(BIN)/python -m bench.img $(BENCH_IMG)

conformance: setup-test  ## every command line of the image tool beside qemu-img
	$(PYTEST) $(PARALLEL) $(LONG) tests/interop/test_img_{conformance,convert,read,change}.py

img-lines: setup-test  ## random lines of the image tool beside qemu-img's for LINES_SECONDS (600)
	$(BIN)/python -m tests.interop.img_random --seconds $(LINES_SECONDS) $(LINES)

nbd-lines: setup-test  ## random lines of the server beside qemu-nbd's for LINES_SECONDS (600)
	$(BIN)/python -m tests.interop.nbd_random --seconds $(LINES_SECONDS) $(LINES)

iotests: setup-test  ## QEMU's own block tests with our programs in the place of QEMU's
	$(BIN)/python -m tests.iotests $(IOTESTS)

matrix: setup-test  ## qcow2 images of every two options, by QEMU and us, both ways
	$(PYTEST) $(PARALLEL) $(LONG) tests/interop/test_option_matrix.py \
	    tests/interop/test_bitmaps_beside_qsd.py

differential-long: setup-test  ## the differential tests for hours rather than minutes
	$(PYTEST) $(LONG) -m slow tests/differential

SAFETY := tests/crash tests/plug tests/faults tests/kills tests/adversity tests/fuzz \
    tests/interleavings tests/hostile tests/differential
FUZZ_SECONDS ?= 60
LINES_SECONDS ?= 600
SAFETY_FUZZ_SECONDS ?= 20
# Of each of some 70 long runs of random operations; differential-long does more.
SAFETY_OPERATIONS ?= 5000
SOAK_SECONDS ?= 7200

safety: setup-test  ## every proof of safety at length (about an hour), see docs/safety.md
	NBDQCOW_LONG_OPERATIONS=$(SAFETY_OPERATIONS) \
	    $(PYTEST) $(PARALLEL) $(LONG) -q $(SAFETY)
	$(BIN)/python -m tests.fuzz --seconds $(SAFETY_FUZZ_SECONDS)

fuzz: setup-test  ## each parser on changed input for FUZZ_SECONDS (60); atheris if installed
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

soak: setup-test  ## SOAK_SECONDS (7200) of mixed load with faults, cuts and kills
	$(BIN)/python -m tests.soak --seconds $(SOAK_SECONDS)

clean:  ## remove all that these targets made: .venv, var, caches
	rm -rf .venv var build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

setup-serve:
	@tools/setup-venv.sh serve

setup-test:
	@tools/setup-system.sh test
	@tools/setup-venv.sh test
