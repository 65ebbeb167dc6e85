# One command each: `make demo` and `make test` set up the virtual environment themselves.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch
BIN := $(VENV)/bin

.PHONY: help install demo test test-all check fix bench docs wheel clean

help:
	@echo "make demo      upgrade a small model on real images, in a few minutes on a CPU; results in demo_output/"
	@echo "make test      run the tests"
	@echo "make test-all  the slow tests too"
	@echo "make check     ruff and mypy"
	@echo "make fix       format, and mend what ruff can"
	@echo "make bench     measure the frozen classifier against its peers"
	@echo "make docs      build the site into docs/_build/"
	@echo "make wheel     build the wheel into dist/"
	@echo "TORCH=torch==2.13.0 VENV=.venv-2.13 make test    with another torch, in another environment"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" -e ".[demo,dev,faiss-cpu,fast,onnx,parquet,postgres,qdrant,report,test,timm]"
	touch $@

demo: install
	$(BIN)/pml-compat demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test-all: install
	$(BIN)/python -m pytest -q

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install
	$(BIN)/python benchmarks/frozen_classifier.py

docs: install
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build demo_output .pytest_cache .mypy_cache .ruff_cache
