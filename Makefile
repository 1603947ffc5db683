# Everything runs in a virtual environment of its own: .venv (and .venv-swift for the S3 server that tests talk to).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?= $(QUARANTINE_DATA)
export MLFLOW_DISABLE_TELEMETRY = true

.PHONY: help setup demo test test-pages check docs compile format images bench-demo bench-fetch bench-gate-mutants bench-hostile bench-overhead bench-purify bench-speed bench-tamper bench-tsbd bench-verify tables clean

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

test: setup .venv-swift/.ready  ## all tests
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

bench-hostile: setup  ## hostile.json
	$(BIN)/python -m benchmarks.hostile

bench-overhead: setup  ## overhead.json
	$(BIN)/python -m benchmarks.overhead

PRESET ?= cpu

bench-purify: setup  ## purification-PRESET.json; PRESET is cpu or gpu, DATA the folder with CIFAR-10 as parquet
	$(BIN)/python -m benchmarks.purification --preset $(PRESET) --data $(DATA)

bench-speed: setup  ## speed.json and cost.json
	$(BIN)/python -m benchmarks.speed --data $(DATA)

bench-tsbd: setup  ## tsbd-cifar.json; DATA is the folder with CIFAR-10 as parquet
	$(BIN)/python -m benchmarks.tsbd_cifar --data $(DATA)
	$(BIN)/python -m benchmarks.tsbd_cifar --data $(DATA) --ablation

images:  ## build the image of the pipeline's steps with docker, podman or buildah
	@builder=$$(command -v docker || command -v podman || command -v buildah) || { echo "images needs docker, podman or buildah" >&2; exit 3; }; \
	version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' defense_core/__init__.py); \
	$$builder build $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) --tag "model-quarantine:$$version" --file images/cpu/Dockerfile .

clean:  ## remove what the targets made
	rm -rf $(VENV) .venv-swift build demo-output
