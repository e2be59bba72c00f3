# SPDX-License-Identifier: Apache-2.0
"""The state of a model's modules at one moment, to change them and to have them back."""

from __future__ import annotations

from torch import nn

# What every module keeps parameters, buffers, submodules and hooks in. Whoever added a hook refers to these very
# objects, so that their contents are put back and not they themselves.
_HELD = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


class ModuleStates:
    """Classes and attributes of a model's modules at the moment when it is made: patches, training modes, hooks, which
    parameters and buffers there are. The numbers in tensors are not kept.

    Kept as tuples: the patch takes a dictionary of submodules that it doesn't know for another model's.
    """

    def __init__(self, model: nn.Module):
        self._modules = [
            (
                module,
                type(module),
                tuple(module.__dict__.items()),
                tuple(
                    (name, tuple(held.items()) if isinstance(held, dict) else tuple(held))
                    for name in _HELD
                    if isinstance(held := module.__dict__.get(name), (dict, set))
                ),
            )
            for module in model.modules()
        ]

    def put_back(self) -> None:
        """Make the modules what they were, whatever was done to them since."""
        for module, kind, attributes, contents in self._modules:
            if type(module) is not kind:
                object.__setattr__(module, "__class__", kind)  # past a patched tower, which watches its attributes
            now, kept = module.__dict__, {name for name, _ in attributes}
            now.update(attributes)
            for name in now.keys() - kept:
                del now[name]
            for name, content in contents:
                now[name].clear()
                now[name].update(content)
