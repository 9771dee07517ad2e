# Every target sets up what it needs on a fresh clone, once: the stamps in .venv say what is done.
#   make serve [MODEL=folder-or-hub-id] [ARGS="--port 9000"]

VENV := .venv
PYTHON ?= python3
# Installed only where the environment has no torch yet, so that a CUDA or ROCm build of yours stays.
TORCH ?= torch==2.13.0
# Processes that run the tests.
WORKERS ?= 2
BIN := $(VENV)/bin
RUN_TESTS = $(BIN)/python tools/run_tests.py -rs -n $(WORKERS)
# Other people's clients and what they pin: an environment of their own.
CLIENTS := .venv-clients
NODE_CLIENTS := build/node-clients
# What a machine has that can build this: all that tests may find on the PATH of `make test-bare`.
BARE_TOOLS := git make g++ gcc as ld ar python3 sh bash env cat chmod cp cut date dirname head id install ln ls mkdir \
	mktemp mv nproc readlink realpath rm rmdir seq sleep sort stat tail tee timeout touch tr uname uniq wc
# torch stays out of the lock file: a build of yours stays, and its CUDA packages are nobody's business here.
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --no-header \
	--no-annotate --override tools/lock_overrides.txt
SOURCES := pyproject.toml requirements.lock $(wildcard setup.py) $(shell find native -type f 2>/dev/null)

.PHONY: help setup serve test test-plain test-bare test-clients test-ray check check-lock lock bench docs site
help:
	@echo "make setup                  install into $(VENV)"
	@echo "make serve MODEL= ARGS=     serve a model; without MODEL the built-in one"
	@echo "make test ARGS=             run the tests"
	@echo "make test-plain ARGS=       run them without the native kernels"
	@echo "make test-bare ARGS=        run them with nothing on the PATH but git, make, g++, Python and coreutils"
	@echo "make test-clients ARGS=     drive other people's clients against the server"
	@echo "make test-ray ARGS=         drive replicas on a Ray cluster that is started for it"
	@echo "make check                  format, lint, types, the lock file"
	@echo "make lock                   write requirements.lock with the newest versions"
	@echo "make bench ARGS=            load a running server"
	@echo "make docs                   write the generated tables anew"
	@echo "make site                   build the documentation as a site in build/site"

setup: $(VENV)/.runtime

serve: $(VENV)/.runtime
	@exec $(BIN)/sensorium serve $(MODEL) $(ARGS)

bench: $(VENV)/.runtime
	@exec $(BIN)/sensorium bench serve $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(RUN_TESTS) $(ARGS)

# The same where the package was installed without a compiler.
test-plain: $(VENV)/.dev
	rm -rf build/plain && mkdir -p build/plain && cp -r src pyproject.toml build/plain
	rm -f build/plain/src/sensorium/kernels/cpu/_native*
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/plain/src $(RUN_TESTS) $(ARGS)

# The same on a fresh machine: no browser, no other program, no variable of anybody's.
test-bare: $(VENV)/.dev
	rm -rf build/bare && mkdir -p build/bare/bin build/bare/home
	for tool in $(BARE_TOOLS); do for folder in $$(echo "$$PATH" | tr : ' '); do \
		if [ -x "$$folder/$$tool" ]; then ln -s "$$folder/$$tool" build/bare/bin/$$tool; break; fi; done; done
	env -i PATH="$(CURDIR)/build/bare/bin" HOME="$(CURDIR)/build/bare/home" OMP_NUM_THREADS=1 \
		$(RUN_TESTS) $(ARGS)

# Unmodified clients against the HTTP side, over a scripted engine. Those for Node are skipped where npm is not.
test-clients: $(VENV)/.dev $(CLIENTS)/.done
	SERVER_PYTHON=$(CURDIR)/$(BIN)/python NODE_CLIENTS=$(CURDIR)/$(NODE_CLIENTS) \
		$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini -rs tests/clients $(ARGS)

# Replicas on a real Ray cluster on this machine: an extra of 80 MB that the other tests do without.
test-ray: $(VENV)/.dev
	$(BIN)/python -c 'import ray' 2>/dev/null || $(BIN)/pip install -c requirements.lock -e '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs tests/cluster $(ARGS)

check: $(VENV)/.dev check-lock
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror native/*
	$(BIN)/mypy

# Current: resolving pyproject.toml again, with the versions that are there preferred, changes nothing.
check-lock: $(VENV)/.dev
	@mkdir -p build && cp requirements.lock build/requirements.lock
	@if $(LOCK) --output-file build/requirements.lock >build/lock.log 2>&1; then \
		diff -u requirements.lock build/requirements.lock || { echo "requirements.lock: run make lock" >&2; exit 1; }; \
	elif grep -qE "Failed to fetch|error sending request|Connection|dns error|timed out" build/lock.log; then \
		echo "requirements.lock is not checked: the package registry cannot be reached" >&2; \
	else cat build/lock.log >&2; exit 1; fi

lock: $(VENV)/.dev
	$(LOCK) --upgrade --output-file requirements.lock
	$(BIN)/uv pip compile tests/clients/requirements.in --quiet --universal --python-version 3.11 --no-header \
		--no-annotate --upgrade --output-file tests/clients/requirements.lock

docs: $(VENV)/.dev
	$(BIN)/python tools/generate_docs.py

site: $(VENV)/.docs
	$(BIN)/zensical build --clean --config-file mkdocs.yml

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' \
		|| $(BIN)/pip install $(TORCH)
	@touch $@

$(VENV)/.runtime: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -c requirements.lock -e .
	@touch $@

# Holds the runtime too: whoever tests first does not install twice.
$(VENV)/.dev: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -c requirements.lock -e '.[dev]'
	@touch $(VENV)/.runtime $@

$(VENV)/.docs: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -c requirements.lock -e '.[docs]'
	@touch $(VENV)/.runtime $@

$(CLIENTS)/.done: tests/clients/requirements.lock tests/clients/package.json tests/clients/ai_sdk.mjs
	test -x $(CLIENTS)/bin/pip || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install -r tests/clients/requirements.lock
	mkdir -p $(NODE_CLIENTS) && cp tests/clients/package.json tests/clients/ai_sdk.mjs $(NODE_CLIENTS)
	cd $(NODE_CLIENTS) && { command -v npm >/dev/null && npm install --no-package-lock --no-audit --no-fund; } \
		|| echo "the clients for Node are left out: there is no npm, or no registry" >&2
	@touch $@
