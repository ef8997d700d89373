# What a new clone needs is `install` and `test`. PYTHON may name another interpreter, 3.11 or newer.
PYTHON ?= python3

.PHONY: install test test-all-pythons lint docs demo-from-wheel

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[test,lint]'
	touch $@

test: install
	.venv/bin/python -m pytest --numprocesses auto

# Each in an environment of its own; those that are not installed are told and passed over.
test-all-pythons:
	@set -e; for version in 3.11 3.12 3.13 3.14; do \
		if python$$version -c "" 2>/dev/null; then \
			echo "python$$version"; \
			python$$version -m venv .venv/python$$version; \
			.venv/python$$version/bin/pip install --quiet --editable '.[test]'; \
			.venv/python$$version/bin/python -m pytest --numprocesses auto; \
		else \
			echo "python$$version is not installed here: passed over"; \
		fi; \
	done

lint: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# docs/cli.md and the manual page, from the help.
docs: install
	.venv/bin/python docs/cli.py
	.venv/bin/python docs/man.py

# What a user would install, used where there is no clone: the demo, from the wheel's files alone.
demo-from-wheel: install
	rm -rf build/lib build/wheel
	.venv/bin/pip wheel --quiet --no-deps --wheel-dir build/wheel .
	.venv/bin/pip install --quiet --no-deps --target build/wheel/installed build/wheel/fluxcli-*.whl
	.venv/bin/python jobs/demo_from_wheel.py build/wheel/installed
