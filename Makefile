# make demo    set up, then train a small detector on drawn shapes (minutes, no GPU needed)
# make test    set up, then run the tests
# make lint    set up, then check the style
# make wheel   set up, then build dist/ddetr-*.whl for this platform, or for another: make wheel PLATFORM=linux-aarch64
# make lock    renew requirements/dev.lock
# make notebooks-strip    take the outputs out of the notebooks, before a commit

PYTHON ?= python3
VENV ?= .venv
PLATFORM = host
BIN := $(VENV)/bin

.PHONY: setup demo test lint wheel lock notebooks-strip

setup: $(VENV)/.done

$(VENV)/.done: requirements/bootstrap.lock requirements/dev.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v <= (3, 13) else "ddetr needs Python 3.10 to 3.13, and %s is %d.%d: make PYTHON=python3.12 ..." % ("$(PYTHON)", *v))'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/bootstrap.lock
	$(BIN)/uv pip install --python $(BIN)/python --require-hashes --no-deps -r requirements/dev.lock
	$(BIN)/uv pip install --python $(BIN)/python --quiet --no-deps --no-build-isolation -e .
	@touch $@

demo: setup
	$(BIN)/ddetr demo

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: setup
	DDETR_WHEEL_PLATFORM=$(PLATFORM) $(BIN)/hatchling build -t wheel

LOCK = uv pip compile --universal --python-version 3.10 --generate-hashes --no-header --quiet

lock:
	$(LOCK) requirements/bootstrap.in -o requirements/bootstrap.lock
	$(LOCK) --extra test --group build pyproject.toml requirements/dev.in -o requirements/dev.lock

notebooks-strip: setup
	$(BIN)/python notebooks/strip.py
