# SPDX-License-Identifier: Apache-2.0
"""Trying a block out before it is patched: does it compute what our own code will compute in its place?"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .guards import copy_without_hooks, has_no_data, has_plain_float_weights, parameters_and_buffers

_EXACT, _ROUNDED = 1e-3, 0.05
_LOCK = threading.Lock()  # random numbers and torch's fast path are the process's


def check_blocks_match(
    blocks: Mapping[int, nn.Module],
    shape: tuple[int, ...],
    theirs: Callable[[Any, Tensor], Tensor | None],
    ours: Callable[[Any, Tensor], Tensor],
) -> None:
    """Send random tokens through each block's own forward and through ours, and refuse a block whose results differ.

    Copies are tried, without hooks and without forwards put on instances, in float32 where weights are floating, and
    random numbers go on as before: nothing that belongs to the user is called or changed. A block whose weights are
    elsewhere (on meta) is not tried.

    Args:
        blocks: blocks of a tower by number, patched or not yet.
        shape: shape of the random tokens.
        theirs: ``theirs(copy, x)``, what the block computes by itself; None: it can't be said.
        ours: ``ours(copy, x)``.

    Raises:
        TypeError: a block is not made of the parts that its class is known for.
        ValueError: the results differ by more than rounding, or a block fails by itself.
    """
    for index, block in blocks.items():
        if not any(map(has_no_data, parameters_and_buffers(block))):
            with _LOCK:
                _check_block_matches(index, block, shape, theirs, ours)


def _check_block_matches(index: int, block: nn.Module, shape: tuple[int, ...], theirs: Any, ours: Any) -> None:
    what = f"block {index}, a {type(block).__name__},"
    twin = copy_without_hooks(block).eval()
    plain = has_plain_float_weights(twin)
    rng = torch.Generator().manual_seed(index)
    if plain:
        twin.float()  # a CPU may not compute in float16, and a block may mix it with float32 outside of autocast
        _randomise_unset(twin, rng)
    weight = next((w for w in parameters_and_buffers(twin) if w.is_floating_point()), torch.empty((), device="cpu"))
    x = torch.randn(shape, generator=rng, device="cpu").to(weight.device, weight.dtype)
    devices = [weight.device] if weight.device.type == "cuda" else []
    # by the weights' dtype, whatever the caller's autocast
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            with torch.random.fork_rng(devices), _without_fast_path():
                want = theirs(twin, x)
        except Exception as error:
            raise ValueError(
                f"{what} fails on random tokens without the patch, so it can't be checked: {error}"
            ) from error
        if want is None:
            return
        try:
            with torch.random.fork_rng(devices):  # from where the other began
                got = ours(twin, x)
        except AttributeError as error:
            raise TypeError(
                f"{what} does not have the parts of its class in the supported versions ({error}): install another "
                "version of its library"
            ) from error
    rounded = not plain or any(_is_quantised(module) for module in twin.modules())
    gap = error_beyond_rounding(got, want, x, _ROUNDED if rounded else _EXACT)
    if gap is not None:
        raise ValueError(
            f"{what} computes something else than its class does in the supported versions (relative error "
            f"{gap:.2g} of its residual on random tokens): tokens can't be merged in it"
        )


@torch.no_grad()
def _randomise_unset(twin: nn.Module, rng: torch.Generator) -> None:
    """Give parameters that say nothing yet (zero, next to it, or never set) random values: a branch that adds nothing
    would hide what it computes."""
    for weight in twin.parameters():
        if weight.numel() and not 1e-2 <= weight.abs().max().item() < 1e4:
            drawn = torch.rand(weight.shape, generator=rng, device="cpu") + 0.1
            if weight.dim() > 1:
                drawn = (drawn - 0.6) * 3 * weight[0].numel() ** -0.5
            weight.copy_(drawn)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Keep torch from reading weights in inference, past adapters and methods that its training calls."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _is_quantised(module: nn.Module) -> bool:
    """Return whether a module, by its name, computes with few bits: one step more or less is no fault."""
    kind = type(module)
    named = f"{kind.__module__}.{kind.__qualname__}".lower()
    return "quant" in named and kind is not nn.modules.linear.NonDynamicallyQuantizableLinear


def error_beyond_rounding(got: Tensor, want: Tensor, x: Tensor, tolerance: float) -> float | None:
    """Return how far two results are apart, as a share of what was added to ``x``, if by more than the tolerance."""
    got, want, x = got.double(), want.double(), x.double()
    added = (want - x).norm().item()
    error = (got - want).norm().item()
    # x itself is rounded too, which shows where a block adds next to nothing to it
    return None if error <= tolerance * added + 1e-6 * want.norm().item() else error / max(added, 1e-30)
