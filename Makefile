# `make demo` and `make test` do all their own set-up; both can be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := build/demo

.PHONY: demo test lint types tests environments docs bench peers precisions edge clean

demo: $(STAMP)
	@mkdir -p build
	$(BIN)/doge-onnx export examples/doge-tiny $(DEMO) --force
	$(BIN)/doge-onnx generate $(DEMO) "It was a dark and stormy night" \
		--max-new-tokens 80 --temperature 0.8 --top-p 0.95 --seed 7 --stats

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

tests: $(STAMP) environments
	$(BIN)/pytest

# For tests with packages that cannot share an environment with the others, and for those in
# JavaScript. What cannot be had here is told, and its tests are skipped.
environments: $(STAMP)
	$(BIN)/python tools/environments.py $(wildcard tests/requirements/*.txt)
	$(BIN)/python tools/javascript.py examples tests/javascript
	$(BIN)/python tools/chromium.py
	$(BIN)/python tools/base_install.py
	$(BIN)/python tools/aarch64.py

# What the documentation takes from the code. A test fails where it is not up to date.
docs: $(STAMP)
	$(BIN)/python tools/documentation.py

bench: $(STAMP)
	$(BIN)/python benchmarks/speed.py

peers: $(STAMP)
	$(BIN)/python benchmarks/peers

precisions: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	$(BIN)/python benchmarks/precisions.py --write

edge: $(STAMP)
	$(BIN)/python benchmarks/edge.py --write

# torch is pinned in constraints.txt: an unpinned one may bring gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

clean:
	rm -rf build $(VENV) examples/node_modules tests/javascript/node_modules
