# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of a training: written by all its processes, and checked before any of one is used.

The keys of a checkpoint are STOP's (``epoch, global_step, arch, state_dict, best_acc1, optimizer, scaler``), its
weights have STOP's names; ``step`` and ``hparams`` are this program's. It holds tensors and plain values
alone, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from stoptome_kernels.stop import archive
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as sharded

from .errors import UsageError
from .parallel import unwrapped

_WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
# a parameter that never had a gradient has no moments: STOP proper has two
_SOME = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
_Count = Annotated[int, Meta(ge=0, le=2**53)]


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: epochs that are finished.
        step: steps of the next one that are.
        global_step: steps in all.
        best: R@1 of the best epoch, text to video, per cent.
    """

    epoch: int = 0
    step: int = 0
    global_step: int = 0
    best: float = -1.0


class _Moments(msgspec.Struct, forbid_unknown_fields=True):
    """AdamW's state of a parameter."""

    step: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class _Group(msgspec.Struct):
    """Parameters of AdamW by their names; their rates and the like are settings of the run."""

    params: list[str]


class _Optimizer(msgspec.Struct, forbid_unknown_fields=True):
    state: dict[str, _Moments]
    param_groups: list[_Group]


class _Scaler(msgspec.Struct, forbid_unknown_fields=True):
    """A GradScaler that was on."""

    scale: Annotated[float, Meta(gt=0, le=2.0**127)]
    growth_factor: Annotated[float, Meta(gt=1, le=2.0**127)]
    backoff_factor: Annotated[float, Meta(gt=0, lt=1)]
    growth_interval: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    _growth_tracker: Annotated[int, Meta(ge=0, le=2**31 - 1)]


class _Weights(msgspec.Struct):
    state_dict: dict[str, Tensor]


class _File(_Weights):
    """A checkpoint of this program, as it lies in its file."""

    epoch: _Count
    step: _Count
    global_step: _Count
    best_acc1: Annotated[float, Meta(ge=-1, le=100)]
    optimizer: _Optimizer
    scaler: dict[str, Any]
    hparams: dict[str, Any]


@dataclass
class Checkpoint:
    """A checkpoint that a training can go on from.

    Attributes:
        path: of the file, for messages.
        weights, optimizer: as torch.distributed.checkpoint gives them, whole and on the CPU.
        scaler: a GradScaler's state; None: it was off.
        hparams: settings of the run, unchecked; see ``options.adopt``.
        progress: how far it was.
    """

    path: str
    weights: dict[str, Tensor]
    optimizer: _Optimizer
    scaler: dict[str, Any] | None
    hparams: dict[str, Any]
    progress: Progress


def capture(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, progress: Progress, hparams: dict
) -> dict[str, Any]:
    """A checkpoint; to be called by all processes, complete in the first."""
    told = asdict(progress)
    return {
        "arch": "STOP",
        "state_dict": sharded.get_model_state_dict(model, options=_WHOLE),
        "optimizer": sharded.get_optimizer_state_dict(model, optimizer, options=_WHOLE),
        "scaler": scaler.state_dict(),
        "best_acc1": told.pop("best"),
        "hparams": hparams,
        **told,
    }


def settings_of(path: str | os.PathLike[str]) -> Any:
    """The settings that a checkpoint of this program was trained with, unchecked; None for other weights, such as
    STOP's own or OpenAI's TorchScript archives.

    Raises:
        UsageError: no such file, or a damaged one.
    """
    found = _load(path)
    return found.get("hparams") if isinstance(found, Mapping) else None


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint that a training can go on from.

    Raises:
        UsageError: no such file, a damaged one, or another kind of file.
    """
    path = os.fspath(path)
    found = _load(path)
    for key in _File.__struct_fields__ if isinstance(found, Mapping) else ():
        if key not in found:
            raise UsageError(
                f"{path} is no checkpoint of this program ({key} is missing); to begin with its weights alone give "
                "--init_model"
            )
    file = _convert(path, found, _File)
    scaler = msgspec.to_builtins(_convert(path, file.scaler, _Scaler)) if file.scaler else None
    progress = Progress(file.epoch, file.step, file.global_step, file.best_acc1)
    return Checkpoint(path, file.state_dict, file.optimizer, scaler, file.hparams, progress)


def load_weights(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Put the weights of a checkpoint into a model that isn't sharded.

    Raises:
        UsageError: no such file, a damaged one, or weights of another model.
    """
    path = os.fspath(path)
    weights = _convert(path, _load(path), _Weights).state_dict
    _same_weights(path, weights, model)
    model.load_state_dict(weights)


def restore(
    found: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Put a checkpoint into model and optimizer; to be called by all processes.

    Raises:
        UsageError: it is of another model or another division of its parameters.
    """
    bare = unwrapped(model)
    _same_weights(found.path, found.weights, bare)
    names: dict[Tensor, str] = {parameter: name for name, parameter in bare.named_parameters()}
    groups = [
        {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
    ]
    kept = [group.params for group in found.optimizer.param_groups]
    learning = {name: parameter for parameter, name in names.items() if parameter.requires_grad}
    if kept != [group["params"] for group in groups]:
        raise _of_another_model(found.path, "its optimizer has other groups of parameters")
    if not found.optimizer.state.keys() <= learning.keys() or (
        found.progress.global_step and not found.optimizer.state
    ):
        raise _of_another_model(found.path, "its optimizer knows other parameters")
    state: dict[str, Any] = {}
    for name, moments in found.optimizer.state.items():
        like = learning[name]
        if not (_fits(moments.exp_avg, like) and _fits(moments.exp_avg_sq, like) and _fits(moments.step, None)):
            raise _of_another_model(found.path, f"its optimizer keeps something else of {name}")
        state[name] = {field: getattr(moments, field) for field in moments.__struct_fields__}
    weights: dict[str, Any] = {**found.weights}
    kept_state: dict[str, Any] = {"state": state, "param_groups": groups}
    try:
        sharded.set_model_state_dict(model, weights, options=_WHOLE)
        sharded.set_optimizer_state_dict(model, optimizer, kept_state, options=_SOME)
    except (RuntimeError, KeyError, ValueError) as error:
        raise _of_another_model(found.path, " ".join(str(error).split())[:300]) from error
    for parameter in [*optimizer.state]:
        if names[parameter] not in state:
            del optimizer.state[parameter]
    if found.scaler:
        scaler.load_state_dict(found.scaler)
    return found.progress


def _load(path: str | os.PathLike[str]) -> Any:
    if not os.path.isfile(path):
        raise UsageError(f"no checkpoint at {os.fspath(path)}")
    try:
        return archive.load(path, mmap=True)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


def _convert(path: str, found: Any, schema: Any) -> Any:
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no checkpoint of this program but a {type(found).__name__}; give another file")
    try:
        return msgspec.convert(found, schema, dec_hook=_hook)
    # a tensor in the place of an object is asked for its keys
    except (msgspec.ValidationError, AttributeError) as error:
        raise UsageError(
            f"{path} is no checkpoint that this program wrote ({error}); give another file, or begin anew"
        ) from error


def _hook(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")
    return value


def _same_weights(path: str, weights: dict[str, Tensor], model: nn.Module) -> None:
    own = model.state_dict()
    for name in (*own, *weights):
        if name not in weights or name not in own:
            raise _of_another_model(path, f"it {'has' if name in weights else 'lacks'} {name}")
        if not _fits(weights[name], own[name]):
            kinds = (
                f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.") for value in (weights[name], own[name])
            )
            raise _of_another_model(path, f"{name} is {' and not '.join(kinds)}")


def _fits(value: Tensor, like: Tensor | None) -> bool:
    """Return whether a value can take the place of another one, or of a float32 scalar."""
    shape, dtype = (torch.Size(), torch.float32) if like is None else (like.shape, like.dtype)
    plain = value.device.type == "cpu" and value.layout is torch.strided and not value.is_quantized
    return plain and value.shape == shape and value.dtype == dtype


def _of_another_model(path: str, what: str) -> UsageError:
    return UsageError(f"{path} fits no model of these settings: {what}; give another checkpoint, or begin anew")
