# `make demo`, `make check` and `make test` do all their own set-up; each can be run again at any
# time. On Windows they need a POSIX shell, such as Git Bash.

VENV := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(VENV)/Scripts
else
PYTHON ?= python3
BIN := $(VENV)/bin
endif
CONSTRAINTS ?= constraints.txt
STAMP := $(VENV)/.installed
# Of the library of native kernels, as it was last built into the package.
KERNELS := $(VENV)/.kernels
DEMO := build/demo
# Two processes, and each file in one of them: what a file's tests share is made once.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

.PHONY: demo check test lint types quick rest environments docs wheels bench peers precisions edge clean

demo: $(KERNELS)
	@mkdir -p build
	$(BIN)/doge-onnx export examples/doge-tiny $(DEMO) --force
	$(BIN)/doge-onnx generate $(DEMO) "It was a dark and stormy night" \
		--max-new-tokens 80 --temperature 0.8 --top-p 0.95 --seed 7 --stats

# While one works: about two minutes.
check: lint types quick

# Before one hands in: everything.
test: lint types quick rest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Coverage is measured here only: before Python 3.12, it makes tracing a model take twice as long.
quick: $(KERNELS)
	$(PYTEST) -m "not slow and not external" --cov

rest: $(KERNELS) environments
	$(PYTEST) -m "slow or external"

# For tests with packages that cannot share an environment with the others, and for those in
# JavaScript. What cannot be had here is told, and its tests are skipped.
environments: $(KERNELS)
	$(BIN)/python tools/environments.py $(wildcard tests/requirements/*.txt)
	$(BIN)/python tools/javascript.py examples tests/javascript
	$(BIN)/python tools/chromium.py
	$(BIN)/python tools/base_install.py
	$(BIN)/python tools/aarch64.py

# What the documentation takes from the code. A test fails where it is not up to date.
docs: $(KERNELS)
	$(BIN)/python tools/documentation.py

# For all systems, into dist/.
wheels: $(KERNELS)
	$(BIN)/python tools/wheels.py

bench: $(KERNELS)
	$(BIN)/python benchmarks/speed.py

peers: $(KERNELS)
	$(BIN)/python benchmarks/peers

precisions: $(KERNELS)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev,docs]'
	$(BIN)/python benchmarks/precisions.py --write

edge: $(KERNELS)
	$(BIN)/python benchmarks/edge.py --write

# torch is pinned in constraints.txt: an unpinned one may bring gigabytes of CUDA packages.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

# The editable install has the library, too; this brings it up to date.
$(KERNELS): $(STAMP) $(wildcard native/*) tools/build_library.py
	$(BIN)/python tools/build_library.py
	@touch $@

clean:
	rm -rf build $(VENV) doge_onnx/runtime/native examples/node_modules tests/javascript/node_modules
