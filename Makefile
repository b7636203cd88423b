# Two commands on a bare machine; each sets up its own .venv, and can be repeated.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: train test lint notebooks clean

train: .venv/run
	$(VENV)/python scripts/train.py --method lora

test: .venv/dev
	$(VENV)/python -m ruff check .
	OMP_NUM_THREADS=1 $(VENV)/python -m pytest -q -n auto --dist worksteal

lint: .venv/dev
	$(VENV)/python -m ruff check .

notebooks: .venv/dev
	$(VENV)/python scripts/notebooks.py

# A folder counts as made only once its marker file is written: an interrupted set-up starts over.
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@ .venv/run

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
