# The two things a new clone needs. PYTHON may name another interpreter, 3.11 or newer.
PYTHON ?= python3

.PHONY: install test lint

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[test,lint]'
	touch $@

test: install
	.venv/bin/python -m pytest

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
