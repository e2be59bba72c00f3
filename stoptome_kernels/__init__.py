# SPDX-License-Identifier: Apache-2.0
"""Token merging as fused operators: match, merge, unmerge."""

from importlib.metadata import PackageNotFoundError, version

try:
    import torch
except ModuleNotFoundError as error:
    raise ImportError("stoptome_kernels needs PyTorch 2.6 or later: see https://pytorch.org/get-started") from error

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    raise ImportError(f"stoptome_kernels needs PyTorch 2.6 or later, found {torch.__version__}: pip install -U torch")

try:
    from . import reference
except ImportError as error:
    raise ImportError(
        "stoptome_kernels.reference is missing: this is a source tree that was never installed; run `pip install -e .` "
        "in it, or leave the folder to use an installed copy"
    ) from error

from ._backends import backends
from .api import attention, augment_qk, fft_conv3d, match, merge, merge_norm, unmerge
from .patch import apply_from_config, apply_tome_patch, describe, is_patched, remove_tome_patch, tome_trace
from .plan import MergePlan
from .sweeps import sweep
from .tome.config import ToMeConfig, add_tome_args
from .tome.sweep import Sweep
from .tome.trace import Trace
from .visualize import visualize
from .vit.interface import register_attention

try:
    __version__ = version("stoptome_kernels")
except PackageNotFoundError:  # a copied folder
    __version__ = "0+unknown"

__all__ = [
    "MergePlan",
    "Sweep",
    "ToMeConfig",
    "Trace",
    "add_tome_args",
    "apply_from_config",
    "apply_tome_patch",
    "attention",
    "augment_qk",
    "backends",
    "describe",
    "fft_conv3d",
    "is_patched",
    "match",
    "merge",
    "merge_norm",
    "reference",
    "register_attention",
    "remove_tome_patch",
    "sweep",
    "tome_trace",
    "unmerge",
    "visualize",
]
