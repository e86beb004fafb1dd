# `make demo` and `make test` are all that a newcomer needs; both set up what they need first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: help setup demo test check format bench proto clean

help:
	@echo "make demo    see a private adapter answer, on this machine (sets up on first use)"
	@echo "make test    run all tests"
	@echo "make check   lint, formatting, strict types, import rules"
	@echo "make bench   measure speed, size and leaks, both sides in one run (hours; benchmarks/RESULTS.md names the parts)"
	@echo "make format  format the code"

setup: $(READY)

# Importing the private layer compiles its kernels and caches them on disk, so that no later command does.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -c 'import splitveil.private.layer'
	touch $(READY)

demo: setup
	$(BIN)/splitveil demo

# Three workers for two cores, since many tests wait for processes, and one torch thread a worker. A file's tests stay
# together, since they share servers and models; files begin in their order, in which the long ones come first.
test: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations=25

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/splitveil bench
	$(BIN)/python benchmarks/peers.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/inversion.py --full
	$(BIN)/python benchmarks/scenarios.py
	$(BIN)/python benchmarks/frontier.py
	$(BIN)/python benchmarks/split_training.py
	$(BIN)/python benchmarks/fixed_length.py
	$(BIN)/python benchmarks/chatglm.py
	PYTHONPATH=tests $(BIN)/python benchmarks/ledger.py
	PYTHONPATH=tests $(BIN)/python benchmarks/metered.py
	PYTHONPATH=tests $(BIN)/python benchmarks/metered.py --qwen
	PYTHONPATH=tests $(BIN)/python benchmarks/metered.py --clients 32
	$(BIN)/python benchmarks/extraction.py --out runs/extraction
	$(BIN)/python benchmarks/republished.py
	$(BIN)/python benchmarks/equality.py

# The generated modules are committed; this makes them anew after a change of a .proto file.
proto: setup
	$(BIN)/python -m grpc_tools.protoc -Isrc --python_out=src --pyi_out=src splitveil/wire/adapter.proto splitveil/wire/split.proto

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
