# Two commands: `make compare` runs the main job, `make test` passes the tests. Both set up .venv first.
# make compare ARGS="--losses sce,mmc" passes options on.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: compare test docs slow bench clean
compare: .venv/ready
	$(BIN)/holdfast compare $(ARGS)

test: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder  # in order of names: the slow file is not the last

docs: .venv/ready-test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

slow: .venv/ready-test
	$(BIN)/pytest -m slow

bench: .venv/ready-test
	$(BIN)/python benchmarks/goals.py $(ARGS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "holdfast needs Python 3.11 or newer, this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/ready: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing torch and 12 other packages, pinned in constraints.txt, into .venv: a few minutes, 1 to 2 GB"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

.venv/ready-test: .venv/ready
	@echo "installing what lint, tests and documentation need into .venv: a few minutes"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv out .pytest_cache .mypy_cache .ruff_cache .hypothesis
