# make train   set up, then train the embedded default    make test   lint, types and the whole test suite
# make lint    ruff and mypy alone                         make docs   write the tables of options from conf/
# make ui      MLflow's pages for the runs made here
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test lint docs ui setup
setup: $(READY)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev]'
	touch $@

train: $(READY)
	$(BIN)/python -m nai_xl.train schedule=ztsnr loss=minsnr

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m nai_xl.docs

ui: $(READY)
	$(BIN)/mlflow ui
