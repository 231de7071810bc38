# Everything lives in .venv, installed from hashed locks. Once there, no target needs the network.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check
LOCKED := $(INSTALL) --require-hashes --only-binary :all:
LOCK := $(BIN)/uv pip compile pyproject.toml --quiet --system-certs --python-version 3.11 \
	--generate-hashes --no-annotate --no-header --no-emit-index-url

# Files that say "this step is done"; each is newer than what it was made from.
CREATED := $(VENV)/.created
RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test soak check bench lock clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

run: $(RUNTIME) ## set up what is missing and serve; make run ARGS="--listen 127.0.0.1:9000"
	$(BIN)/nix-cache-proxy serve $(ARGS)

test: $(DEVELOPMENT) ## run the tests; make test ARGS="-k narinfo"
	$(BIN)/pytest -n auto $(ARGS)

soak: $(DEVELOPMENT) ## all faults, and long random histories; make soak ARGS="--minutes 30"
	SOAK_EXAMPLES=1000 $(BIN)/pytest -n auto -m hypothesis --hypothesis-profile random
	$(BIN)/python -m tests.chaos $(ARGS)

check: $(DEVELOPMENT) ## lint, format, types, layers; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict proxy tests bench
	$(BIN)/lint-imports

bench: $(DEVELOPMENT) ## compare with nginx, and with no proxy; make bench ARGS="hot --rounds 3"
	$(BIN)/python -m bench $(ARGS)

lock: $(DEVELOPMENT) ## write the locks anew from pyproject.toml; make lock ARGS=--upgrade
	$(LOCK) --group build $(ARGS) --output-file requirements.lock
	$(LOCK) --group build --group dev $(ARGS) --constraint requirements.lock --output-file requirements-dev.lock

clean: ## remove .venv and the caches of the tools
	rm -rf $(VENV) dist .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find proxy tests bench -name __pycache__ -prune -exec rm -rf {} +

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 ...")
try:
    import ensurepip, venv
except ImportError:
    sys.exit(f"{sys.executable} cannot make a virtual environment; on Debian: apt-get install python3-venv")
endef
export CHECK_PYTHON

# A .venv that was moved, or whose Python is gone since an upgrade of the system, is made anew.
ifneq ($(shell test -x $(BIN)/python && cat $(CREATED) 2>/dev/null),$(CURDIR))
.PHONY: $(CREATED)
endif

$(CREATED):
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not there; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv --clear $(VENV)
	@echo "$(CURDIR)" >$@

# Ourselves last, in place (editable): everything that it takes is in the lock, so nothing is fetched.
$(RUNTIME): $(CREATED) requirements.lock pyproject.toml
	$(LOCKED) -r requirements.lock
	$(INSTALL) --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.lock
	$(LOCKED) -r requirements-dev.lock
	@touch $@
