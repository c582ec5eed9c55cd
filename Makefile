# `make demo` and `make test` are all that a fresh machine needs (Python 3.11+, git, make).
PYTHON ?= python3
BIN := .venv/bin
# The version that was tested. For the CPU build alone (smaller), point it at PyTorch's CPU wheels: make TORCH='torch==2.13.0 --index-url ...'
TORCH ?= torch==2.13.0
# What comes along; viewer (rerun, 0.5 GB) is left out.
EXTRAS ?= cpu,mlflow,sweep,quant,trt,dev
# Test processes; a file's tests stay in one, which keeps what they share, and files keep the order of tests/conftest.py.
# pytest's other plugins, which come with packages that no test asks for, would be imported and rewritten in each.
JOBS ?= 2
PYTEST = PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15
# Where it is set, every command that a test starts compiles all of recon's modules again.
unexport PYTHONDONTWRITEBYTECODE

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

slow: .venv/ready
	$(PYTEST) -m slow

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
