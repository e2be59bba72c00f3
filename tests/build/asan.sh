#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer into a folder of their own and runs the
# tests that reach them, on every instruction set. Python and torch are not instrumented: the runtimes are preloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")") # not resolved: a link into a virtual environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source" "$work/run"
cp -r csrc python_ref stoptome_kernels pyproject.toml setup.py README.md LICENSE "$work/source"
rm -f "$work"/source/stoptome_kernels/*.so
cp -r tests pyproject.toml "$work/run"
flags="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
STOPTOME_REQUIRE_NATIVE=1 STOPTOME_CXXFLAGS=$flags \
    "$python" -m pip install -q --no-deps --no-build-isolation --target "$work/site" "$work/source"

cd "$work/run" # not the checkout: its own build of the kernels would hide the instrumented one
export PYTHONPATH=$work/site ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)"
export LD_PRELOAD
"$python" - <<'PYTHON'
from stoptome_kernels import _native

symbols = open(_native.__file__, "rb").read()
assert b"__asan_report" in symbols and b"__ubsan_handle" in symbols, f"{_native.__file__} is not instrumented"
PYTHON
export OMP_NUM_THREADS=2 # tests/conftest.py has one, and what threads share is to be seen here
"$python" -m pytest -q --capture=sys -p no:cacheprovider -k "native and not 2_31" \
    tests/ops/test_{native,native_attention,golden,by_hand,match,merge,merge_norm,merge_norm_library}.py
