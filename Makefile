# `make demo` and `make test` set up everything they need, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUBPACKAGES := benchmarks modules teleprompters

.PHONY: demo test check dev links
demo: $(VENV)/.ready
	$(BIN)/preceptor demo

test: check
	$(BIN)/pytest --numprocesses 2 --dist worksteal

check: links $(VENV)/.ready-dev
	$(BIN)/ruff format --check . && $(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pyright

dev: links $(VENV)/.ready-dev

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable '.[peers,ray]'
	touch $@

# Type checkers and import-linter don't see through an editable install: git-ignored links show them
# the folders under their import names.
links:
	@mkdir -p _links; test -L _links/preceptor || ln -s ../framework _links/preceptor
	@for d in $(SUBPACKAGES); do test -L framework/$$d || ln -s ../$$d framework/$$d; done
