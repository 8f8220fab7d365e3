# `make demo` and `make test` are all one needs; `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
# A requirement or a wheel file. Installed first and by itself, so that nothing later asks for another release.
TORCH ?= torch==2.13.0
# Test processes at a time.
JOBS ?= 2
# More arguments for `ktk demo` and for pytest.
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)
SOURCES := $(shell find ktk native -type f -not -name '*.py[co]') \
  meson.build meson.options pyproject.toml README.md LICENSE
CPP_FILES := $(shell find native tests -name '*.cpp' -o -name '*.h' -o -name '*.c')

.PHONY: help demo test lint native-test sanitize sanitize-thread sanitize-address sdist pytest pytest-ctypes numa docs wheel clean
help:
	@echo "make demo           generate text with the shipped model and compare the weight formats"
	@echo "make test           everything below"
	@echo "make lint           ruff, mypy and clang-format"
	@echo "make wheel          build the wheel: build/wheel/*.whl"
	@echo "make sdist          build an sdist, and hold the wheel made from it against the other one"
	@echo "make native-test    C++ tests"
	@echo "make sanitize       C++ tests under ThreadSanitizer, and under Address- and UBSanitizer"
	@echo "make pytest         Python tests under the Cython binding; PYTEST_ARGS=... chooses some"
	@echo "make pytest-ctypes  those to which the binding matters, under the ctypes binding"
	@echo "make numa           where threads and memory are, on emulated machines with several NUMA nodes (20 minutes)"
	@echo "make docs           HTML documentation in build/docs"
	@echo "make clean          remove build/ and the virtual environment"

# Quick checks come first, and the longest run last, so that a log ends with its summary. Two at a time where
# each leaves a core idle now and then.
test:
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=recurse lint wheel
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=recurse native-test sanitize-thread sanitize-address sdist
	@$(MAKE) --no-print-directory pytest-ctypes
	@$(MAKE) --no-print-directory pytest

demo: $(VENV)/.demo
	$(BIN)/ktk demo $(DEMO_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP_FILES)

wheel: build/wheel/.done

sdist: $(VENV)/.dev build/wheel/.done
	PATH="$$PWD/$(BIN):$$PATH" $(BIN)/python tests/tools/check_sdist.py build/sdist build/wheel/*.whl

# In the folder that the wheel was made in: what they link with is the wheel's library.
native-test: $(VENV)/.dev build/wheel/.done
	@PATH="$$PWD/$(BIN):$$PATH" tests/tools/native_tests.sh build/native

sanitize: sanitize-thread sanitize-address

sanitize-thread: $(VENV)/.dev
	@PATH="$$PWD/$(BIN):$$PATH" tests/tools/native_tests.sh build/native-tests-thread thread

sanitize-address: $(VENV)/.dev
	@PATH="$$PWD/$(BIN):$$PATH" tests/tools/native_tests.sh build/native-tests-address address,undefined

pytest: $(VENV)/.test
	KTK_BINDING=cython KTK_BUILD_DIR="$$PWD/build/native" $(PYTEST)

pytest-ctypes: $(VENV)/.test
	KTK_BINDING=ctypes $(PYTEST) -m "not any_binding"

# Needs qemu-system-x86_64, and Debian's apt-get for a kernel to boot.
numa: $(VENV)/.test
	$(BIN)/python tests/numa/run.py --log build/numa.log

docs: $(VENV)/.test
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

clean:
	rm -rf build $(VENV)

# ---- set-up: a stamp for each step, so that nothing is done twice --------------------------------

$(VENV)/.torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ktk needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install "$(TORCH)"
	@touch $@

# Tools to compile with.
$(VENV)/.build: $(VENV)/.torch pyproject.toml
	$(BIN)/python tests/tools/requirements.py build > $(VENV)/build.txt
	$(PIP) install -r $(VENV)/build.txt
	@touch $@

# Tools and libraries for work on ktk, without ktk itself.
$(VENV)/.dev: $(VENV)/.build pyproject.toml tests/constraints.txt
	$(BIN)/python tests/tools/requirements.py dev > $(VENV)/dev.txt
	$(PIP) install -c tests/constraints.txt -r $(VENV)/dev.txt
	@touch $@

# The build folder is kept, for the next time to be quick, and knows the C++ tests without building them.
# In an environment of pip's own, as any user has it, `make sdist` builds.
build/wheel/.done: $(VENV)/.build $(SOURCES)
	rm -rf build/wheel
	PATH="$$PWD/$(BIN):$$PATH" $(PIP) wheel --no-deps --no-build-isolation --wheel-dir build/wheel \
	  -Cbuild-dir=build/native -Csetup-args=-Dnative_tests=true .
	@touch $@

$(VENV)/.test: $(VENV)/.dev build/wheel/.done
	$(PIP) install --force-reinstall --no-deps build/wheel/*.whl
	@touch $@

$(VENV)/.demo: build/wheel/.done
	wheel=$$(echo build/wheel/*.whl); $(PIP) install -c tests/constraints.txt "$$wheel[cli,transformers]"
	$(PIP) install --force-reinstall --no-deps build/wheel/*.whl
	@touch $@
