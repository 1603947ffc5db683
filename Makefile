# Everything runs in a virtual environment of its own: .venv (and .venv-swift for the S3 server that tests talk to).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= $(QUARANTINE_DATA)
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: help setup demo test test-pages check docs compile format images image-base test-images bench-demo bench-fetch bench-floor bench-gate-mutants bench-hooks bench-hostile bench-overhead bench-preemption bench-purify bench-scan bench-speed bench-sweep bench-tamper bench-tsbd bench-verify tables clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.ready  ## install into .venv

.venv-swift/.ready: tests/integration/setup_swift.sh
	bash tests/integration/setup_swift.sh
	touch $@

demo: setup  ## train a backdoored digits model and take it through the whole pipeline
	$(BIN)/quarantine demo --out demo-output

test: setup .venv-swift/.ready  ## all tests (the S3 server needs Debian's liberasurecode-dev, installed where this runs as root)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

tests/pages/node_modules/.ready: tests/pages/package-lock.json
	npm ci --prefix tests/pages --no-audit --no-fund
	touch $@

test-pages: setup tests/pages/node_modules/.ready  ## axe-core on every page, in a headless Chromium (needs npm and chromium)
	$(BIN)/python -m pytest tests/pages/check_pages.py

check: setup  ## ruff, mypy, import-linter, compiled pipeline, the docs and their figures
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pipelines.compile --check
	$(BIN)/python -m benchmarks.tables --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: setup  ## the documentation as a site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

compile: setup  ## write the KFP pipeline's IR to build/
	$(BIN)/quarantine compile --out build

format: setup  ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-demo: setup  ## demo.json and demo-quality.json
	$(BIN)/python -m benchmarks.demo

bench-fetch: setup .venv-swift/.ready  ## fetch.json
	$(BIN)/python -m benchmarks.fetch

bench-tamper: setup  ## tamper.json
	$(BIN)/python -m benchmarks.tamper

bench-verify: setup  ## verify.json
	$(BIN)/python -m benchmarks.verify

tables: setup  ## figures from benchmarks/results into the docs
	$(BIN)/python -m benchmarks.tables

bench-gate-mutants: setup  ## gate-mutants.json
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gate_mutants

bench-hooks: setup  ## hook-fuzz.json, hook-load.json and hook-burst.json; needs root, and a machine with nothing else to do
	$(BIN)/python -m benchmarks.hook_fuzz
	$(BIN)/python -m benchmarks.hook_load
	$(BIN)/python -m benchmarks.hook_burst

bench-hostile: setup  ## hostile.json
	$(BIN)/python -m benchmarks.hostile

bench-overhead: setup  ## overhead.json
	$(BIN)/python -m benchmarks.overhead

PRESET ?= cpu

bench-purify: setup  ## purification-PRESET.json; PRESET is cpu or gpu, DATA the folder with CIFAR-10 as parquet
	$(BIN)/python -m benchmarks.purification --preset $(PRESET) --data $(DATA)

bench-floor: setup  ## floor.json: the same triggers on a clean model; DATA as for bench-purify
	$(BIN)/python -m benchmarks.floor --data $(DATA)

bench-scan: setup  ## scan.json, scan-summary.json and the pools that come along; DATA as for bench-purify
	$(BIN)/python -m benchmarks.scan --family digits
	$(BIN)/python -m benchmarks.scan --family digits_vit
	$(BIN)/python -m benchmarks.scan --family cifar10 --data $(DATA)

bench-speed: setup  ## speed.json and cost.json; DATA as for bench-purify
	$(BIN)/python -m benchmarks.speed --data $(DATA)

bench-preemption: setup  ## preemption.json
	$(BIN)/python -m benchmarks.preemption

bench-sweep: setup  ## sweep.json
	$(BIN)/python -m benchmarks.sweep

bench-tsbd: setup  ## tsbd-cifar.json; DATA is the folder with CIFAR-10 as parquet
	$(BIN)/python -m benchmarks.tsbd_cifar --data $(DATA)
	$(BIN)/python -m benchmarks.tsbd_cifar --data $(DATA) --ablation

images:  ## build the images with docker, podman or buildah: BASE_IMAGE, BUILDER, TAG, FLAVOURS
	BASE_IMAGE='$(BASE_IMAGE)' BUILDER='$(BUILDER)' TAG='$(TAG)' bash images/build.sh $(FLAVOURS)

image-base:  ## a base image from Debian's packages, for test-images where no image registry is reached (needs debootstrap)
	bash tests/images/base.sh

test-images: setup  ## build the cpu and hooks images and run the demo in them (needs podman and a base image)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/images/check_containers.py

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-swift build demo-output tests/pages/node_modules
