#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the native kernels with ThreadSanitizer, their loops on C++ threads, and runs all of them by two to five threads.
# Python and torch are not instrumented: the runtime is preloaded.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=$(realpath -s "$(command -v "${PYTHON:-python3}")") # not resolved: a link into a virtual environment
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/source"
cp -r csrc python_ref stoptome_kernels pyproject.toml setup.py README.md LICENSE "$work/source"
rm -f "$work"/source/stoptome_kernels/*.so
cp tests/build/tsan_threads.cpp "$work/source/csrc/cpu/threads.cpp"
flags="-g -O1 -fno-omit-frame-pointer -fsanitize=thread"
STOPTOME_REQUIRE_NATIVE=1 STOPTOME_CXXFLAGS=$flags \
    "$python" -m pip install -q --no-deps --no-build-isolation --target "$work/site" "$work/source"

cd "$work" # not the checkout: its own build of the kernels would hide the instrumented one
export PYTHONPATH=$work/site TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=0:exitcode=66
LD_PRELOAD="$(${CXX:-c++} -print-file-name=libtsan.so)"
export LD_PRELOAD
# setarch: ThreadSanitizer wants addresses that are not drawn at random
run="setarch $(uname -m) -R $python"
$run - <<'PYTHON'
from stoptome_kernels import _native

assert b"__tsan_" in open(_native.__file__, "rb").read(), f"{_native.__file__} is not instrumented"
PYTHON
$run - <<'PYTHON'
import stoptome_kernels as stk
import torch

# enough items for each thread to have a share of them, and one that the threads share
for items, tokens, dim, channels in ((2000, 16, 40, 8), (1, 4000, 64, 64)):
    metric, x, size = torch.randn(items, tokens, channels), torch.randn(items, tokens, dim), torch.rand(items, tokens)
    weight = torch.ones(dim, requires_grad=True)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        plan = stk.match(metric, tokens // 4, backend="native")
        for mode in ("mean", "sum", "max"):
            leaf = x.clone().requires_grad_()
            stk.merge(leaf, plan, size, mode, "native")[0].square().sum().backward()
        leaf = x.clone().requires_grad_()
        y, rows, _ = stk.merge_norm(leaf, leaf, plan, size, weight, weight, backend="native")
        (rows.square().sum() + stk.unmerge(y, plan, "native").square().sum()).backward()
print("ThreadSanitizer: all kernels ran on 2, 3 and 5 threads")
PYTHON
