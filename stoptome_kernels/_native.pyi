# SPDX-License-Identifier: Apache-2.0
# csrc/cpu/binding.cpp; private: called by _backends/native.py with what checks.py has checked

_Strided = tuple[int, int, int]  # address, stride of an item, stride of a row
_Heads = tuple[int, int, int, int]  # address, strides of an item, a head and a token
_AttentionShape = tuple[int, int, int, int, int, int, int]  # items, heads, queries, tokens, channels; of the prefix
_Groups = tuple[int, int, int, int, int, _Strided]  # members, offsets; items, tokens in, tokens out; sizes

INTERFACE: int
CONV_BLOCK: int

def match(
    metric: tuple[int, int, int, int], shape: tuple[int, int, int, int], dtype: int, r: int, protected: int, order: int,
    sources: int, plan: tuple[int, int, int], threads: int,
) -> None: ...
def reduce(
    x: _Strided, y: _Strided, dtype: int, mode: int, groups: _Groups, dim: int, size_out: int,
    fresh: bool, threads: int,
) -> None: ...
def spread(
    grad: _Strided, out: _Strided, dtype: int, mode: int, groups: _Groups, dim: int, x: _Strided,
    y: _Strided, threads: int,
) -> None: ...
def merge_norm(
    x: _Strided, residual: _Strided, y: _Strided, normed: _Strided, dtype: int, groups: _Groups, dim: int,
    size_out: int, weight: int, bias: int, eps: float, mean: int, rstd: int, threads: int,
) -> None: ...
def merge_norm_backward(
    grad_normed: _Strided, grad_y: _Strided, y: _Strided, out: _Strided, dtype: int, groups: _Groups, dim: int,
    mean: int, rstd: int, weight: int, affine: int, threads: int,
) -> None: ...
def conv(
    shape: tuple[tuple[int, int, int, int], tuple[int, int, int], tuple[int, int]], dtype: int, x: int, y: int,
    waves: tuple[int, int], filters: int, filters_grad: int, threads: int,
) -> None: ...
def attention(
    q: _Heads, k: _Heads, v: _Heads, prefix_k: _Heads, prefix_v: _Heads, shape: _AttentionShape, dtype: int,
    sizes: _Strided, scale: float, out: int, lse: int, threads: int,
) -> None: ...
def expect_writes(out: int, bytes: int) -> None: ...
def use_openmp_of(path: str) -> bool: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_stream_bytes(bytes: int) -> int: ...
def set_huge_bytes(bytes: int) -> int: ...
