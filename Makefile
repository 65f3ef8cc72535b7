# Two commands set everything up on a machine that has git, Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo demo-dit test bench lint clean

demo: $(VENV)/.ready
	$(BIN)/python demo/run.py

demo-dit: $(VENV)/.ready
	$(BIN)/python demo/run_dit.py

test: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/pyright

# torch is pinned in requirements.txt: the same command gets the build that fits the machine, with or without a GPU
$(VENV)/.ready: pyproject.toml requirements.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'bitwright needs Python 3.11 or newer, this is ' + sys.version"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --editable ".[test,encoder,diffusers,demo]"
	touch $@

clean:
	rm -rf $(VENV) demo/out demo/out-dit build dist *.egg-info
