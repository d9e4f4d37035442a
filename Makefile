# `make run` serves the demo model and a chat page, `make test` passes every test; both install what they need into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install chromium run test test-ranks test-others test-all unit lint format clean

install: $(STAMP)

# torch first: another package's looser requirement would bring a different build of it. DeepSpeed is a source
# distribution whose build imports torch, so it is built in this environment.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt pip setuptools wheel
	$(PIP) install -q -c constraints.txt torch numpy ninja packaging py-cpuinfo
	DS_BUILD_OPS=0 $(PIP) install -q -c constraints.txt --no-build-isolation deepspeed
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[test,bench,chat]'
	touch $@

run: install
	python scripts/run_demo.py

# For the tests of the chat page. Where we may not install it they are skipped, in CI they fail.
chromium:
	@command -v chromium >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } || true

# What drives browsers and clients first, alone; then ranks, which wait a lot, beside all others.
test: install chromium lint
	python -m pytest tests/chat tests/clients
	$(MAKE) -j2 --no-print-directory test-ranks test-others

test-ranks: install
	env -u MAKEFLAGS python -m pytest tests/ranks  # ninja would take make's jobs for its own

test-others: install
	env -u MAKEFLAGS python -m pytest tests/gpu tests/model tests/serve tests/unit

# The whole matrix of ranks x models beside it.
test-all: export DS_SERVE_TEST_ALL = 1
test-all: test

unit: install
	python -m pytest tests/unit

lint: install
	ruff check
	ruff format --check
	lint-imports --no-cache

format: install
	ruff check --fix
	ruff format

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
