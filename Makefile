# Every target sets up what it needs in .venv first; nothing but python3 and make has to be there.
# Without make: CONTRIBUTING.md and README.md give the same commands.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint bench clean
.NOTPARALLEL:

demo:
	$(PYTHON) setup_env.py
	$(BIN)/python -m qruntime demo

test:
	$(PYTHON) setup_env.py reference peers bench dev
	$(BIN)/python -m pytest -q -n auto

lint:
	$(PYTHON) setup_env.py dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench:
	$(PYTHON) setup_env.py reference bench
	rm -f build/bench/results.json
	$(BIN)/python -m benchmarks run --model tiny --out build/bench/results.json
	$(BIN)/python -m benchmarks report build/bench/results.json --out build/bench

clean:
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
