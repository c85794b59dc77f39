# Two commands: `make demo` and `make test`. Both set up everything they need under .venv.
PYTHON ?= python3
VENV ?= .venv

.PHONY: test
test: $(VENV)/dev
	$(VENV)/bin/ruff check kernels reference model benchmarks tests
	$(VENV)/bin/ruff format --check kernels reference model benchmarks tests
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/dev: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@
