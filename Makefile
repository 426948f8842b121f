# Two commands do everything on a machine with git, make and Python >= 3.11:
#   make demo    a small checkpoint, verified, converted, run in llama.cpp and proved
#   make test    lint, types and the whole suite
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test lint types suite clean

demo: $(READY)
	$(BIN)/python -P examples/demo.py

test: lint types suite

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

suite: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptoss-convert needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo build dist *.egg-info
