#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the native kernels with AddressSanitizer and UndefinedBehaviorSanitizer into a folder of their own and runs the
# tests that reach them on every instruction set. Python and torch are not instrumented: the runtime is preloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r csrc python_ref stoptome_kernels tests pyproject.toml setup.py README.md LICENSE "$work"
cd "$work"
rm -f stoptome_kernels/*.so
STOPTOME_REQUIRE_NATIVE=1 STOPTOME_CXXFLAGS="-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" \
    "$python" -m pip install -q --no-deps --no-build-isolation --target site .
# torch and Python leak by design at exit; their allocations are not what is tested
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so)" \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=site \
    "$python" -m pytest -q -p no:cacheprovider -m "not slow" -k "native" --deselect tests/test_native.py::test_one_pool_of_threads \
    tests/test_native.py tests/test_golden.py tests/test_by_hand.py tests/test_match.py tests/test_merge.py
