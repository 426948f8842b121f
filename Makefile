# Two commands do everything on a machine with git, make and Python >= 3.11:
#   make demo    a small checkpoint, verified, converted, run in llama.cpp and proved
#   make test    lint, types and the whole suite
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
AZUREML = .cache/azureml/.ready

.PHONY: demo test lint types suite clean

demo: $(READY)
	$(BIN)/python -P examples/demo.py

test: lint types suite

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

suite: $(READY) $(AZUREML)
	$(BIN)/pytest -n 2 --dist loadfile

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gptoss-convert needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

# A second interpreter for the tests of one export; where it cannot be made, they are skipped and say so.
$(AZUREML): constraints-azureml.txt
	{ $(PYTHON) -m venv $(@D) && $(@D)/bin/python -m pip install --quiet --constraint constraints-azureml.txt \
	  azure-ai-ml mlflow-skinny pandas && touch $@; } || echo 'azure-ai-ml cannot be installed: its tests are skipped'

clean:
	rm -rf $(VENV) demo build dist *.egg-info
