# `make demo` and `make test` are all that a fresh machine needs (Python 3.11+, git, make).
PYTHON ?= python3
BIN := .venv/bin
# The version that was tested. For the CPU build alone (smaller), point it at PyTorch's CPU wheels: make TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# What comes along; viewer (rerun, 0.5 GB) is left out.
EXTRAS ?= cpu,mlflow,sweep,quant,trt,dev
# Test processes; a file's tests stay in one, which keeps what they share.
JOBS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=15

.PHONY: demo test lint slow matrix clean

demo: .venv/ready
	$(BIN)/python -m recon

test: .venv/ready
	$(PYTEST)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# In the order of the files' names: sorted by their count of tests, as by default, the longest tests would come last.
slow: .venv/ready
	$(PYTEST) --no-loadscope-reorder -m slow

matrix: .venv/ready
	$(PYTEST) -m matrix

.venv/ready: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'recon needs Python 3.11 or newer; this is ' + sys.version)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRAS)]"
	@$(BIN)/python -m recon.doctor > /dev/null  # ends here, naming it, where a system library is missing
	touch $@

clean:
	rm -rf .venv outputs
