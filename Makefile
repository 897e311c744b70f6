# `make bench` and `make test` need Python 3.11 or newer, gcc or clang, and the way to a Python package index; the rest they set
# up themselves in .venv. The other targets are for those who change hotloops.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
# enabled: it is an error when the C kernels cannot be built
CKERNELS ?= auto
# for the command that a target runs: make test ARGS="-k conv2d"
ARGS ?=
BIN := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := -Csetup-args=-Dckernels=$(CKERNELS)
SOURCES := pyproject.toml meson.build meson.options $(shell find csrc kernels python -name '*.py' -o -name '*.[ch]' -o -name meson.build)

.PHONY: bench test dev lint format types simulator ptx neon neon-tools sanitize dist clean

# Compares the backends on this machine.
bench: $(VENV)/.bench
	$(BIN)/hotloops bench --quick $(ARGS)

# The whole suite, against the installed package.
test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

# An editable install with all tools: the next import rebuilds what changed.
dev: $(VENV)/.tools
	$(PIP) install -q --no-build-isolation $(SETUP) -Csetup-args=-Dwerror=true -e '.[dev]'
	touch $(VENV)/.editable $(VENV)/.dev $(VENV)/.test $(VENV)/.bench

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/*.[ch] tests/*.c

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.[ch] tests/*.c

# The type checker sees python/hotloops and kernels as the one package that they become.
types: $(VENV)/.dev
	rm -rf build/types && mkdir -p build/types/hotloops
	ln -s $(CURDIR)/python/hotloops/* $(CURDIR)/kernels build/types/hotloops/
	MYPYPATH=build/types $(BIN)/mypy -p hotloops

# The CUDA kernels in Numba's simulator; and compiled for real GPUs, as far as that goes without one.
simulator: $(VENV)/.test
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/python -m pytest tests/test_kernels.py -k cuda $(ARGS)

ptx: $(VENV)/.dev
	HOTLOOPS_REQUIRE_PTX=1 $(BIN)/python -m pytest tests/test_ptx.py $(ARGS)

# The C kernels for 64-bit ARM, in an emulator: every case of every kernel.
neon: $(VENV)/.test neon-tools
	@test -e build/neon/build.ninja || \
	  meson setup build/neon --cross-file csrc/aarch64.ini -Dbuildtype=release -Dwerror=true -Dckernels=enabled -Dtest_server=true
	meson compile -C build/neon
	HOTLOOPS_SERVER="qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/csrc/server" \
	  $(BIN)/python -m pytest tests/test_kernels.py tests/test_elementary.py tests/test_emulated.py -k emulated $(ARGS)

neon-tools:
	@there() { command -v qemu-aarch64 && command -v aarch64-linux-gnu-gcc && test -e /usr/aarch64-linux-gnu/lib/libc.so; } >/dev/null; \
	packages="qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross"; \
	there || { test $$(id -u) = 0 && apt-get update -q && apt-get install -y -q $$packages && there; } || \
	  { echo "No compiler or no emulator for 64-bit ARM (on Debian: apt-get install $$packages)"; exit 1; }

# The suite on C kernels that stop at the first access out of bounds or undefined operation. Tests with Numba in their name
# are left out: its code is not made by this compiler. What stops a worker stops the run, with the test's name.
sanitize: $(VENV)/.test
	$(PYTHON) -m venv --clear --without-pip build/sanitize/venv
	cd build/sanitize/venv/lib/python*/site-packages && ls -d $(abspath $(VENV))/lib/python*/site-packages > packages.pth
	$(PIP) --python build/sanitize/venv/bin/python install -q --no-deps --no-build-isolation --ignore-installed . \
	  -Cbuild-dir=build/sanitize/meson -Csetup-args=-Dckernels=enabled -Csetup-args=-Dbuildtype=debugoptimized \
	  -Csetup-args=-Db_sanitize=address,undefined -Csetup-args=-Db_lundef=false -Csetup-args=-Dc_args=-fno-sanitize-recover=all
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc HOTLOOPS_REQUIRE_C=1 \
	  build/sanitize/venv/bin/python -m pytest -q -n 2 --dist worksteal --max-worker-restart 0 --timeout 1200 -k 'not numba and not cuda' \
	  --ignore tests/test_packaging.py --ignore tests/test_ptx.py $(ARGS)

# dist/: the source archive, and the wheel built from it.
dist: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build -q --no-isolation $(SETUP) .

clean:
	rm -rf build dist $(VENV)

# ---- set-up: $(VENV)/.NAME is there when the extra NAME is installed, with hotloops as its sources are now

$(VENV)/.test $(VENV)/.bench: $(SOURCES)
$(VENV)/.dev: pyproject.toml

$(VENV)/.test $(VENV)/.bench $(VENV)/.dev: | $(VENV)/.tools
	@echo "Installing hotloops[$(patsubst .%,%,$(@F))] in $(VENV), the first time with its packages: some minutes"
	@test -e $(VENV)/.editable || \
	  $(PIP) install -q --no-build-isolation $(SETUP) -Cbuild-dir=build/wheel '.[$(patsubst .%,%,$(@F))]'
	@touch $@

# Debian keeps parts of Python in packages of their own: ensurepip in python3-venv, Python.h in python3-dev.
$(VENV)/.tools:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || \
	  { test $$(id -u) = 0 && apt-get update -q && apt-get install -y -q python3-venv && $(PYTHON) -m venv --clear $(VENV); } || \
	  { echo "No way to make $(VENV) (on Debian: apt-get install python3-venv)"; exit 1; }
	@header=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h; test -e $$header || \
	  { test $$(id -u) = 0 && apt-get install -y -q python3-dev; } || \
	  echo "No C kernels: $$header is missing (on Debian: apt-get install python3-dev, then make clean)"
	@$(PIP) install -q --upgrade pip 'meson-python>=0.20' 'meson>=1.4' ninja 'cffi>=2.1'
	@touch $@
