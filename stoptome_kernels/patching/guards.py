# SPDX-License-Identifier: Apache-2.0
"""Guards: hooks, replaced forwards and sharding, which keep a patch from doing its work, and copies without them.

A call of a module is more than its class's forward: hooks, a forward put on the instance (accelerate, a user's own),
weights that are elsewhere until it is called, adapters in place of a weight. Whoever reads weights leaves all of that
out, so that a module is asked first, at each call, and called if anything of it is there.
"""

from __future__ import annotations

import copy
import gc
from collections import OrderedDict
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch.nn.modules.module as everywhere
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..tome.report import warn

# the last two stand for plain weights while a graph is made
_PLAIN = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)
_READ = ("weight", "bias", "in_proj_weight", "in_proj_bias")
_EVERY_MODULE = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in _EVERY_MODULE if name.endswith("_hooks"))  # those of state_dict, too


def may_read_weights(*modules: Any) -> bool:
    """Return whether calling each of these modules is its class's forward on weights that are there, and nothing else.

    Modules inside them are not looked at.
    """
    for module in modules:
        if not calls_only_class_forward(module):
            return False
        for weight in module._parameters.values():
            if weight is not None and (type(weight) not in _PLAIN or weight.is_meta):
                return False
        for name in _READ:  # put in the place of parameters, as FSDP1 and DataParallel do with plain tensors
            weight = module.__dict__.get(name)
            if weight is not None and (type(weight) not in _PLAIN or weight.is_meta):
                return False
    return True


def calls_only_class_forward(module: Any) -> bool:
    """Return whether calling a module is its class's forward and nothing else, whatever its weights are."""
    return not (
        has_hooks_or_forward(module)
        or everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def has_hooks_or_forward(module: Any) -> bool:
    """Return whether hooks or a forward were put on this very module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def instance_forward(module: Any) -> Any:
    """Return the forward that somebody put on a module itself, which hides its class's; None if there is none.

    The module's own method, which some libraries leave there when they go, is nobody's: it is taken away.
    """
    forward: Any = module.__dict__.get("forward")
    kind: Any = type(module)
    if isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is kind.forward:
        module.__dict__.pop("forward")
        return None
    return forward


def has_no_data(tensor: Tensor) -> bool:
    """Return whether a tensor has no numbers to compute with: it is on meta, or fake."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def parameters_and_buffers(module: nn.Module) -> Iterable[Tensor]:
    """Yield parameters and buffers of a module and of all modules in it."""
    yield from module.parameters()
    yield from module.buffers()


def has_plain_float_weights(module: nn.Module) -> bool:
    """Return whether a module and all in it have floating weights of torch's own kind alone, none quantised or fake."""
    own = (nn.Parameter, Tensor)
    return all(type(weight) in own and weight.is_floating_point() for weight in module.parameters())


def _copy_if_possible(value: Any) -> Any:
    """Return a copy where there can be one: not of a lock, a stream, or of tensors of a class that can't be copied."""
    if type(value) is nn.Parameter:
        return nn.Parameter(value.detach().clone(), value.requires_grad)
    if type(value) is Tensor:  # even one that was computed, as torch's old weight_norm keeps it
        return value.detach().clone()
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def copy_without_hooks(module: Any) -> Any:
    """Return a deep copy of a module, weights included, without hooks and without forwards put on instances.

    Whatever is done to the copy, and whatever its modules keep or count, leaves no trace in the original.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name in _HOOKS:
            memo[id(part.__dict__[name])] = OrderedDict()
        for name in ("forward", "_old_forward", "_hf_hook"):  # accelerate's hook holds the weights of a whole model
            if name in part.__dict__:
                memo[id(part.__dict__[name])] = None
    try:
        twin = copy.deepcopy(module, dict(memo))
    except Exception:  # of whatever somebody's own objects raise: those are shared
        for part in module.modules():
            own = [value for name, value in part.__dict__.items() if name not in _EVERY_MODULE]
            for value in (*own, *part._parameters.values(), *part._buffers.values()):
                if id(value) not in memo:
                    memo[id(value)] = _copy_if_possible(value)
        twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for name in ("forward", "_old_forward", "_hf_hook"):
            if part.__dict__.get(name, part) is None:
                del part.__dict__[name]
    return twin


def check_unsharded(*modules: Any) -> None:
    """Raise if one of these modules was given to ``fully_shard``.

    Raises:
        RuntimeError: it was.
    """
    for module in modules:
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            raise RuntimeError(f"{type(module).__name__} is already sharded: patch first, then call fully_shard")


def check_method_not_replaced(module: Any, *names: str) -> None:
    """Raise if a method of a module was replaced on the module itself.

    Raises:
        RuntimeError: it was.
    """
    for name in names:
        if name in module.__dict__ and (name != "forward" or instance_forward(module) is not None):
            raise RuntimeError(
                f"{type(module).__name__} has a {name} of its own, set by another library (accelerate?), which would "
                "hide the patch: patch first, then pass the model to that library"
            )


def warn_of_shared_blocks(model: nn.Module, blocks: Iterable[Any]) -> None:
    """Warn if a module outside of the model holds some of its blocks: another model, say, that was made of them.

    Python knows who refers to an object; modules hold others in their ``_modules``.
    """
    inside = {id(module._modules) for module in model.modules()}
    for holder in gc.get_referrers(*blocks):
        if isinstance(holder, dict) and id(holder) not in inside and _is_modules_of_a_module(holder):
            warn(
                f"some blocks of {type(model).__name__} are also in another module, which gets merged tokens from them "
                "from now on: if this is not intended, patch a copy of the model (copy.deepcopy)"
            )
            return


def _is_modules_of_a_module(modules: dict) -> bool:
    return any(isinstance(owner, dict) and owner.get("_modules") is modules for owner in gc.get_referrers(modules))
