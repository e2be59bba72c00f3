# SPDX-License-Identifier: Apache-2.0
"""A GPU that is not there: Triton's binder, cache and compiler for sm_90 over a driver that launches nothing.

    from harness import no_gpu
    gpu = no_gpu.install()         # before any kernel of the package is imported
    model(images)                  # tensors on the CPU
    gpu.launches, gpu.variants     # what a GPU would have been given to do

The package's ``auto`` and ``triton`` then run the launch path of the Triton kernels: they bind, compile and allocate as
on a GPU. What they return is the reference's result. ``pretend`` goes further, for programs that ask for a device
``cuda`` and time it by events. Nothing that is measured this way is a result.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MULTIPROCESSORS, SHARED_BYTES, REGISTERS = 132, 232448, 65536  # of an H100
WAITING = {  # operations whose result, or its shape, the host reads from the device; and copies from its own memory
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "histc", "lift_fresh",
}  # fmt: skip
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
READING = ("cpu", "numpy", "tolist", "__array__")  # methods of a tensor that do so past the dispatcher
ENTRIES = ("match", "reduce", "spread", "merge_norm", "merge_norm_backward", "attention", "attention_backward")


@dataclass
class Gpu:
    """Everything that reached the driver, in order, since ``clear``."""

    launches: list[str] = field(default_factory=list)  # kernels by name
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)  # kernels that were compiled, or read from Triton's cache
    operations: list[str] = field(default_factory=list)  # of torch inside the launch path, allocations among them
    waits: list[str] = field(default_factory=list)  # what was asked of a tensor that makes the host wait for a GPU
    results: bool = True  # return the reference's; False: what the launch path allocated, for counting large models

    def clear(self) -> None:
        for found in (self.launches, self.grids, self.variants, self.operations, self.waits):
            found.clear()

    def forget(self) -> None:
        """Forget every variant, as a new process has it; those on the disk stay."""
        from stoptome_kernels._backends.triton import attention, attention_grad, launch, match, merge, norm

        launch.forget()
        for module in (attention, attention_grad, match, merge, norm):
            for kernel in vars(module).values():
                getattr(kernel, "device_caches", {}).clear()


def install(results: bool = True) -> Gpu:
    """Put the driver under Triton and let the package take CPU tensors for a GPU's; return what will be seen.

    Args:
        results: return what the reference computes, and check that the launch path allocated outputs of its shapes
            and dtypes. False: return what the launch path allocated, for timing the host alone.

    Raises:
        RuntimeError: the kernels were imported under Triton's interpreter.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from stoptome_kernels._backends import REFERENCE, TRITON
    from stoptome_kernels._backends import triton as backend
    from stoptome_kernels._backends.triton import merge
    from stoptome_kernels.video import blocks as stream
    from triton.runtime import driver

    if not isinstance(merge.reduce_rows, triton.runtime.JITFunction):
        raise RuntimeError("the kernels were imported under TRITON_INTERPRET=1: install() in a process without it")
    gpu = Gpu()
    driver.set_active(_driver(gpu))
    backend._guard = lambda device: None
    TRITON.unavailable_reason = lambda device, dtype, explicit: None if dtype in backend._DTYPES else f"no {dtype}"
    # what a GPU runs though its test is for a device: the question is asked of a tensor that says it is there
    pays = stream._metric_columns_cheaper
    stream._metric_columns_cheaper = lambda attn, x: pays(attn, SimpleNamespace(is_cuda=True, numel=x.numel))
    for name in READING if results else ():
        setattr(torch.Tensor, name, _noted(name, getattr(torch.Tensor, name), gpu))
    for name in ENTRIES if results else ():
        setattr(TRITON, name, _both(name, getattr(TRITON, name), getattr(REFERENCE, name), gpu))
    return gpu


def _both(name: str, ours: Any, theirs: Any, gpu: Gpu) -> Any:
    """Run the launch path, then the reference, whose result is returned."""

    def run(*args, **options):
        with _Operations(gpu):
            allocated = ours(*args, **options)
        if not gpu.results:
            for index in (t for t in tree_leaves(allocated) if t is not None and not t.is_floating_point()):
                index.zero_()  # which whoever gathers by it may take
            return allocated
        right = theirs(*args, **options)
        for index, (got, want) in enumerate(zip(tree_leaves(allocated), tree_leaves(right), strict=True)):
            if (got is None) != (want is None) or (got is not None and _form(got) != _form(want)):
                raise AssertionError(f"{name}: output {index} is {_form(got)}, the reference's {_form(want)}")
        return right

    return run


def _noted(name: str, method: Any, gpu: Gpu) -> Any:
    def read(tensor, *args, **options):
        gpu.waits.append(name)
        return method(tensor, *args, **options)

    return read


def waits(func: Any, args: tuple) -> bool:
    """Return whether the host waits for a GPU in an operation of torch."""
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":
        return func._overloadname == "Tensor"
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # by a mask: how many are chosen is data
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return name in WAITING


class WithoutProducts(TorchDispatchMode):
    """Operations of torch as they are, but products and convolutions are zeros: in half precision they take minutes on
    a CPU, and no launch depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ not in PRODUCTS:
            return func(*args, **(kwargs or {}))

        def on(device: str) -> Any:
            return lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

        args, kwargs = tree_map_only(torch.Tensor, on("meta"), (args, kwargs or {}))
        return tree_map_only(torch.Tensor, lambda t: on("cpu")(t).zero_(), func(*args, **kwargs))


def _form(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


class _Operations(TorchDispatchMode):
    """Notes the operations of torch that run under it, and those that wait for a GPU."""

    def __init__(self, gpu: Gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.gpu.operations.append(func.overloadpacket.__name__)
        if waits(func, args):
            self.gpu.waits.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def _driver(gpu: Gpu) -> Any:
    """Return all that Triton asks of a driver (triton/runtime/jit.py, triton/compiler/compiler.py)."""
    import triton
    from triton.backends.compiler import GPUTarget

    release = tuple(int(part) for part in triton.__version__.split(".")[:2])

    class Utils:
        def load_binary(self, name, kernel, shared, device):
            gpu.variants.append(name)
            found = (1, 1, 32, 0, 1024)  # module, function, registers, spills; the most threads since Triton 3.4
            return found if release > (3, 3) else found[:4]

        def unload_module(self, module):
            pass

        def get_device_properties(self, device):
            return {
                "max_shared_mem": SHARED_BYTES, "multiprocessor_count": MULTIPROCESSORS, "max_num_regs": REGISTERS,
                "warpSize": 32,
            }  # fmt: skip

    class Launcher:
        def __init__(self, src, metadata):
            self.name = getattr(src.fn, "__name__", None) or src.fn.fn.__name__

        def __call__(self, x, y, z, *arguments):
            gpu.launches.append(self.name)
            gpu.grids.append((x, y, z))

    class Driver:
        utils, launcher_cls = Utils(), Launcher

        def get_current_device(self):
            return 0

        def set_current_device(self, device):
            pass

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_device_interface(self):
            return torch.cuda

    return Driver()


# -- a device by the name of cuda -------------------------------------------------------------------------------------


class _OnCpu(TorchFunctionMode):
    """Takes every device ``cuda`` that a function is given for the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = (args[0], *map(_cpu, args[1:]))
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    """A device ``cuda`` as the CPU; anything else as it is."""
    if isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value


class _Event:
    def __init__(self, **_):
        self.at = 0.0

    def record(self, *_):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end: _Event) -> float:
        return max(1e-6, (end.at - self.at) * 1e3)


class _Stream:
    def synchronize(self):
        pass


class _Graph:
    def replay(self):
        pass


def _nothing(*_, **__) -> int:
    return 0


_CUDA = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "none",
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: SimpleNamespace(
        name="none", L2_cache_size=50 << 20, total_memory=80 << 30, multi_processor_count=MULTIPROCESSORS
    ),
    "mem_get_info": lambda *_: (80 << 30, 80 << 30),
    "max_memory_allocated": lambda *_: 1,
    "is_bf16_supported": lambda *_, **__: True,
    "Event": _Event,
    "Stream": _Stream,
    "CUDAGraph": _Graph,
    "current_stream": lambda *_: _Stream(),
    "stream": lambda *_: nullcontext(),
    "graph": lambda *_, **__: nullcontext(),
    **dict.fromkeys(
        ("synchronize", "empty_cache", "_sleep", "memory_allocated", "reset_peak_memory_stats", "set_stream",
         "set_sync_debug_mode", "manual_seed_all"),
        _nothing,
    ),
}  # fmt: skip


_mode: list[_OnCpu] = []


def pretend() -> None:
    """Let this process ask for a device ``cuda``: tensors lie on the CPU, events read its clock, graphs are empty."""
    import torch._dynamo  # reads the functions that are replaced below

    if not _mode:
        for name, value in _CUDA.items():
            setattr(torch.cuda, name, value)
        torch.cuda.graphs.graph_pool_handle = _nothing  # which make_graphed_callables asks for
        _mode.append(_OnCpu())
        _mode[0].__enter__()


def pretending() -> bool:
    """Return whether this process has no GPU but was told that it has."""
    return bool(_mode)


def pytest_load_initial_conftests() -> None:
    """Install the driver and pretend before any test is imported: ``python -m pytest -p harness.no_gpu``."""
    install()
    pretend()
