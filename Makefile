# make demo    set up, then train a small detector on drawn shapes (minutes, no GPU needed)
# make test    set up, then run the tests
# make lint    set up, then check the style
# make wheel   set up, then build dist/ddetr-*.whl for this platform, or for another: make wheel PLATFORM=linux-aarch64
# make gpu-kit  put dist/gpu-kit together: `ddetr bench gpu` for a machine with a GPU and no network (benchmarks/gpu-kit/make.sh)
# make lock    renew requirements/*.lock
# make notebooks-strip    take the outputs out of the notebooks, before a commit
#
# make image            build the container pytorch-cuda:v2.6 with Docker or podman; container/build.sh has the options (VARIANT, BASE_IMAGE, CA)
#                       make image VARIANT=cu130 builds pytorch-cuda:current: a newer PyTorch, for Blackwell GPUs (image-train, test-image, sbom too)
# make image-train      its variant for clusters, without Jupyter and sshd
# make image-light      its variant without PyTorch, to try how it starts
# make base             a base image of Debian's packages, for a machine that reaches no container registry
# make test-container   build the light variant and try its start, Jupyter and SSH (minutes)
# make test-image       build the full one, run ddetr's tests and a short training inside it (7 GB, long)
# make sbom             a software bill of materials of the built image, CycloneDX: dist/pytorch-cuda-v2.6.cdx.json
# make image-lock       renew container/requirements-build.lock, and the locks in container/v2.6 and container/current

PYTHON ?= python3
VENV ?= .venv
PLATFORM = host
BIN := $(VENV)/bin

.PHONY: setup demo test lint wheel gpu-kit lock notebooks-strip image image-train image-light base test-container test-image sbom image-lock

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
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: setup
	DDETR_WHEEL_PLATFORM=$(PLATFORM) $(BIN)/hatchling build -t wheel

gpu-kit: setup
	BIN=$(BIN) benchmarks/gpu-kit/make.sh

LOCK = uv pip compile --universal --python-version 3.10 --generate-hashes --no-header --quiet

lock:
	$(LOCK) requirements/bootstrap.in -o requirements/bootstrap.lock
	$(LOCK) --extra test --group build pyproject.toml requirements/dev.in -o requirements/dev.lock
	uv pip compile --no-deps --python-version 3.12 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --quiet -c requirements/dev.lock requirements/gpu-kit.in -o requirements/gpu-kit.lock

notebooks-strip: setup
	$(BIN)/python notebooks/strip.py

# The tag is the variant's.
TAG = $(shell $(PYTHON) container/build_arguments.py $(VARIANT) | sed -n 's/^IMAGE_VERSION=//p')
IMAGE = pytorch-cuda:$(TAG)

image:
	container/build.sh workspace $(IMAGE)

image-train:
	container/build.sh train $(IMAGE)-train

image-light:
	LOCK=light container/build.sh workspace $(IMAGE)-light

base:
	container/base.sh

test-container: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'container and not slow' tests/container

test-image: image
	container/test_image.sh $(IMAGE)

sbom: setup
	mkdir -p dist
	CYCLONEDX="$(BIN)/uv tool run --quiet --from cyclonedx-bom==7.5.0 cyclonedx-py" container/sbom.sh $(IMAGE) > dist/pytorch-cuda-$(TAG).cdx.json

image-lock:
	$(LOCK) container/requirements-build.in -o container/requirements-build.lock
	for tag in v2.6 current; do \
	  locks=container/$$tag/requirements && \
	  $(LOCK) pyproject.toml container/requirements-core.in container/$$tag/torch.in -o $$locks-core.lock && \
	  $(LOCK) -c $$locks-core.lock container/requirements-workspace.in -o $$locks-workspace.lock && \
	  $(LOCK) -c $$locks-core.lock --extra test pyproject.toml -o $$locks-test.lock || exit 1; \
	done
	$(LOCK) -c container/v2.6/requirements-core.lock container/requirements-light.in -o container/v2.6/requirements-light.lock
