# make demo     train and compare on synthetic scans; ends with runs/demo/report.html
# make test     run the tests, on all cores
# make test-torchvision   run the tests that need torchvision, in an environment of their own (several GB)
# make test-trainers  run the tests that need TRL or Lightning, in an environment of their own
# make test-notebook  run examples/look_and_answer.ipynb in Jupyter's kernel, in an environment of its own
# make test-versions     run a slice of them on the newest and on the lowest versions that pyproject.toml allows
# make check    lint, formatting, types, import rules
# make docs     build the documentation into site/
# make dist     build the sdist, and the wheel from it, into dist/, and look what is in them
# make clean    remove the virtual environment
#
# Everything is installed into .venv. Another Python: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

# torchvision fits one torch only, and not the one that is smallest to install.
TORCHVISION ?= torch==2.14.1 torchvision==0.29.1

# What the tests of others' trainers run with.
TRAINERS ?= trl==1.16.0 datasets==5.2.0 lightning==2.6.6

# What the notebook runs in.
NOTEBOOK ?= nbclient==0.11.0 ipykernel==7.4.0

# What builds a release.
BUILD ?= build==1.6.1

# What `test-newest` and `test-lowest` run beside tests/installed.py: what leans on other packages most.
SLICE := $(addprefix tests/test_,compat.py package.py capture.py peft.py decoding.py checkpoint.py images.py tables.py)

# Both slices take the torch that is smallest to install; make test-lowest TORCH=torch==2.6.0 (several GB) takes another.
TORCH ?= $(shell grep '^torch==' constraints.txt)

# One process for each core, of one thread each (tests/conftest.py); one that has nothing left takes from the others.
ALL_CORES := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-torchvision test-trainers test-notebook test-versions test-newest test-lowest check docs dist clean

demo: $(VENV)/.installed
	$(BIN)/a3tune demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ALL_CORES)

test-torchvision: $(VENV)-torchvision/.installed
	$(VENV)-torchvision/bin/python -m pytest tests/test_litemedsam.py
	$(VENV)-torchvision/bin/python tests/parity/biomedclip.py

test-trainers: $(VENV)-trainers/.installed
	$(VENV)-trainers/bin/python -m pytest tests/test_trl.py tests/test_lightning.py

test-notebook: $(VENV)-notebook/.installed
	$(VENV)-notebook/bin/python -m pytest tests/test_notebook.py

test-versions: test-newest test-lowest

# From the wheel, without extras: the tests must not find src/, nor what an extra brings.
test-newest test-lowest: test-%: $(VENV)-%/constraints.txt
	rm -rf dist
	$(VENV)-$*/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)-$*/bin/python -m pip uninstall --quiet --yes a3tune
	$(VENV)-$*/bin/python -m pip install --upgrade --upgrade-strategy eager --constraint $< --group test dist/*.whl
	$(VENV)-$*/bin/python -I tests/installed.py
	$(VENV)-$*/bin/python -m pytest $(ALL_CORES) $(SLICE)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --quiet

dist: $(VENV)-dist/.installed
	rm -rf dist
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/python tests/dist.py

clean:
	rm -rf $(VENV) $(VENV)-dist $(VENV)-torchvision $(VENV)-trainers $(VENV)-notebook $(VENV)-newest $(VENV)-lowest

# pip reads dependency groups from 25.1 on; a new environment may come with an older one.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade "pip>=25.1"

# Installed again only when what is installed may have changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[medical,excel,quantize,reports,ray,app,serve,track]' --group dev
	touch $(VENV)/.installed $@

$(VENV)-newest/constraints.txt: constraints.txt | $(VENV)-newest/bin/python
	echo '$(TORCH)' > $@

$(VENV)-lowest/constraints.txt: constraints.txt pyproject.toml tests/lowest.py | $(VENV)-lowest/bin/python
	$(PYTHON) tests/lowest.py > $@.all
	grep -v '^torch==' $@.all > $@
	echo '$(TORCH)' >> $@

$(VENV)-newest/bin/python $(VENV)-lowest/bin/python:
	$(PYTHON) -m venv $(patsubst %/bin/python,%,$@)
	$@ -m pip install --upgrade "pip>=25.1"

$(VENV)-torchvision/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-torchvision
	$(VENV)-torchvision/bin/python -m pip install --upgrade "pip>=25.1"
	grep -v '^torch==' constraints.txt > $(VENV)-torchvision/constraints.txt
	$(VENV)-torchvision/bin/python -m pip install --constraint $(VENV)-torchvision/constraints.txt $(TORCHVISION) \
		--editable '.[litemedsam]' --group test open_clip_torch
	touch $@

$(VENV)-trainers/.installed: BESIDE = $(TRAINERS)
$(VENV)-notebook/.installed: BESIDE = $(NOTEBOOK)
$(VENV)-trainers/.installed $(VENV)-notebook/.installed: $(VENV)-%/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip install --upgrade "pip>=25.1"
	$(VENV)-$*/bin/python -m pip install --constraint constraints.txt $(BESIDE) --editable . --group test
	touch $@

$(VENV)-dist/.installed:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install $(BUILD)
	touch $@
