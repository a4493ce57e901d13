# Short names for what is done often; `make test` is the README's test command in an existing environment.
PYTHON ?= .venv/bin/python

.PHONY: test lint verify bench

test:
	$(PYTHON) -m pytest

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

verify:
	$(PYTHON) -m checker verify

bench:
	$(PYTHON) -m tests.benchmarks
