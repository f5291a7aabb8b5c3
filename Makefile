# make demo     train and compare on synthetic scans; ends with runs/demo/report.html
# make test     run the tests
# make check    lint, formatting, types, import rules
# make docs     build the documentation into site/
# make clean    remove the virtual environment
#
# Everything is installed into .venv. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

.PHONY: demo test check docs clean

demo: $(VENV)/.installed
	$(BIN)/a3tune demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV)

# pip reads dependency groups from 25.1 on; a new environment may come with an older one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"

# Installed again only when what is installed may have changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[medical,quantize]' --group dev
	touch $(VENV)/.installed $@
