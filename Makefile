# make            says what there is to make
# PYTHON=...      another interpreter for the environment (3.11 or newer)
# NOTEBOOKS=...   only these notebooks for run and notebooks
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup run test notebooks lab compat bundle clean

NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)
NOTEBOOKS ?= $(sort $(wildcard notebooks/*.ipynb))
INSTALL := -m pip install -qq --disable-pip-version-check
BIN := .venv/bin
OLD := diffusers==0.39.0 transformers==5.15.0 huggingface-hub==1.27.0 numpy==2.1.3 pillow==11.3.0 ipywidgets==7.7.1

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: .venv/.stamp  ## the environment in .venv, pinned by constraints.txt

.venv/.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into .venv (minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python $(INSTALL) -c constraints.txt torch
	@$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev,train]'
	@touch $@

run: setup  ## run every notebook on the bundled model, pages in build/course
	@$(BIN)/python -m p2p_helpers.course html $(NOTEBOOKS)

test compat: export HF_HUB_OFFLINE := 1
test compat: export TRANSFORMERS_OFFLINE := 1
test: setup  ## unit tests, checks of the stored notebooks, and the notebooks run again
	@$(BIN)/python -m pytest --nbval-lax tests notebooks

notebooks: setup  ## run notebooks from clean kernels and store their outputs in place
	@$(BIN)/python -m p2p_helpers.course execute $(NOTEBOOKS)

lab: setup  ## JupyterLab
	@$(BIN)/jupyter lab notebooks

compat: .venv-compat/.stamp  ## unit tests with the versions that Colab has
	@.venv-compat/bin/python -m pytest tests

.venv-compat/.stamp: pyproject.toml Makefile
	@echo "Installing into .venv-compat (minutes the first time)"
	@test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	@.venv-compat/bin/python $(INSTALL) -c constraints.txt torch
	@.venv-compat/bin/python $(INSTALL) $(OLD) -e '.[dev,train]'
	@touch $@

define INSTALL_SH
#!/bin/sh
# Installs the course without network into .venv beside this file.
set -eu
cd "$$(dirname "$$0")"
$${PYTHON:-PYTHON_VERSION} -m venv .venv
.venv/bin/python -m pip install --quiet --no-index --find-links wheels 'p2p-helpers[dev,train]'
echo "Installed. Start with: .venv/bin/jupyter lab notebooks"
endef
export INSTALL_SH

bundle: setup  ## dist/p2p-course.tar.gz: all of it for laptops like this one without network
	@rm -rf build/p2p-course && mkdir -p build/p2p-course dist
	@echo "Collecting wheels"
	@$(BIN)/python -m pip wheel -qq -c constraints.txt -w build/p2p-course/wheels '.[dev,train]'
	@cp -r notebooks data README.md LICENSE NOTICE build/p2p-course/
	@echo "$$INSTALL_SH" | sed "s/PYTHON_VERSION/$$($(BIN)/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')/" \
		> build/p2p-course/install.sh
	@chmod +x build/p2p-course/install.sh
	@tar --exclude=__pycache__ --exclude=.ipynb_checkpoints -czf dist/p2p-course.tar.gz -C build p2p-course
	@ls -lh dist/p2p-course.tar.gz

clean:  ## remove what was built (the environments stay)
	rm -rf build dist .pytest_cache
