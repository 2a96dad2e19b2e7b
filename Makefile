# Each target does the set-up it needs; a second call skips finished work.
# ARGS goes to the program: make test ARGS="-k merge", make demo ARGS=--short

PYTHON := .venv/bin/python
ARGS ?=
# One process per core; an idle one takes over another's remaining tests. ARGS="-n 0" runs them in one process.
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup test demo smollm2 lint docs clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: ## Find Python 3.12 or 3.13, make .venv and install the pinned dependencies
	@bash tools/setup_env.sh

test: setup ## Run the tests
	@$(PYTHON) -m pytest $(PARALLEL) $(ARGS)

demo: setup ## Retrofit a small language model to a quarter of its KV cache, write demo/report.html
	@$(PYTHON) examples/demo.py $(ARGS)

smollm2: setup ## Retrofit SmolLM2-135M to a quarter and an eighth of its KV cache, write smollm2/report
	@$(PYTHON) examples/smollm2/run.py $(ARGS)

lint: setup ## Check format, style and types
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy

docs: setup ## Build the documentation, build/site/index.html
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build

clean: ## Remove what the other targets wrote, but not .venv
	@rm -rf build dist demo smollm2 *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find megatron_dmc examples tools tests -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
