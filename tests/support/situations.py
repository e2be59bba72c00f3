# SPDX-License-Identifier: Apache-2.0
"""Situations of patched models, and what comes of them in each family: as without the patch, or refused.

``python -m support.situations`` (in tests/) writes the table in docs/situations.md, which the tests check.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from support import ROOT
from support.families import Family, attention, families, first_of, get, in_weights, mlp_out, norm, out, scale, scale_in

AS_BEFORE, REFUSED = "as unpatched", "refused"
# What is refused is always about the attention.
WAYS_OUT = re.compile(r"remove_tome_patch|patch first|patch before|patch again|before patching|remove that|deepcopy")
TABLE = ROOT / "docs" / "situations.md"


@dataclass(frozen=True)
class Situation:
    """Something that is done to a model's second block, and what does the same to its weights.

    Attributes:
        name: in the table.
        before, after: done before the patch, and after it.
        fold: done to the weights, before the patch; None: it changes nothing.
        everywhere: a context in which the model runs.
    """

    name: str
    before: Callable[[Any], Any] | None = None
    after: Callable[[Any], Any] | None = None
    fold: Callable[[Any], Any] | None = None
    everywhere: Callable | None = None

    def got(self, family: Family) -> Any:
        """The patched model in this situation."""
        model = family.make()
        if self.before:
            self.before(family.block(model))
        model = family.patch(model)
        if self.after:
            self.after(family.block(model))
        return model


def on_first(change: Callable[[Tensor], Tensor], given: Any) -> Any:
    """A tensor, or the first of a tuple, changed."""
    return (change(given[0]), *given[1:]) if isinstance(given, tuple) else change(given)


def hook(place: Callable, change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda block: get(place(block)).register_forward_hook(lambda _module, _args, given: on_first(change, given))


def wrap(place: Callable) -> Callable:
    """Give the module itself a forward that turns and halves what its own gives."""

    def put(block: Any) -> None:
        module = get(place(block))
        own = module.forward
        module.forward = lambda *args, **options: on_first(lambda x: x * -0.5, own(*args, **options))

    return put


def halve_inputs(block: Any) -> None:
    def halved(_module, args, options):
        half = lambda x: x * 0.5 if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 else x  # noqa: E731
        return tuple(map(half, args)), {name: half(x) if name == "hidden_states" else x for name, x in options.items()}

    get(attention(block)).register_forward_pre_hook(halved, with_kwargs=True)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


class Halved(Tensor):
    """A weight that is half of what is stored."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def plain(x, factor=0.5):
            return x.as_subclass(Tensor) * factor if isinstance(x, Halved) else x

        if function in (nn.functional.layer_norm, nn.functional.linear):
            return function(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})
        return super().__torch_function__(function, types, args, kwargs or {})


def subclass_norm(block: Any) -> None:
    module = get(norm(block))
    for name in ("weight", "bias"):
        stored = getattr(module, name).detach().as_subclass(Halved)
        module._parameters[name] = nn.Parameter(stored)
        assert type(module._parameters[name]) is Halved


def parametrize_norm(block: Any) -> None:
    for name in ("weight", "bias"):
        parametrize.register_parametrization(get(norm(block)), name, Half())


def parametrize_in(block: Any) -> None:
    for owner, name in in_weights(block):
        parametrize.register_parametrization(owner, name, Half())


class HalfNorm(nn.LayerNorm):
    """A norm of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def another_norm(block: Any) -> None:
    owner, name = norm(block)
    old = getattr(owner, name)
    new = HalfNorm(old.normalized_shape, old.eps)
    new.load_state_dict(old.state_dict())
    setattr(owner, name, new.eval())


class Adapter(nn.Module):
    """Around an attention: calls it, turns and halves what it gives."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **options):
        return on_first(lambda x: x * -0.5, self.inner(*args, **options))


def adapt(block: Any) -> None:
    owner, name = attention(block)
    setattr(owner, name, Adapter(getattr(owner, name)))


class Other(nn.Module):
    """Another attention: takes anything, and gives what it got."""

    batch_first = True

    def forward(self, *args, **options):
        x = args[0] if args else options["hidden_states"]
        return x, None


def replace(block: Any) -> None:
    owner, name = attention(block)
    setattr(owner, name, Other())


def offload(block: Any) -> None:
    """Weights on meta, brought when a module is called."""
    from accelerate import cpu_offload

    reads = isinstance(get(attention(block)), nn.MultiheadAttention) or hasattr(get(attention(block)), "in_proj_weight")
    cpu_offload(block, torch.device("cpu"), preload_module_classes=[type(block).__name__] if reads else None)


@contextmanager
def global_hook(family: Family, model: Any):
    module = get(norm(family.block(model)))
    handle = nn.modules.module.register_module_forward_hook(lambda m, _args, x: x * 0.5 if m is module else None)
    try:
        yield
    finally:
        handle.remove()


def nothing(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def lora(block: Any) -> None:
    """PEFT's LoRA on all that makes the attention's projections."""
    from peft import LoraConfig, inject_adapter_in_model

    attn = get(attention(block))
    names = ["qkv", "proj", "q_proj", "k_proj", "v_proj", "out_proj", "o_proj", "query", "key", "value"]
    where = [attention(block)[1]] if isinstance(attn, nn.MultiheadAttention) else names
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=where, init_lora_weights=False), block)
    block.eval()


def folded_lora(block: Any) -> None:
    """The same, folded into the weights."""
    from peft.tuners.lora import LoraLayer

    lora(block)
    for name, module in list(block.named_modules()):
        if isinstance(module, LoraLayer) and not name.endswith("base_layer.out_proj"):
            owner, last = first_of(block, name)
            whole = hasattr(module, "unload_and_optionally_merge_module")
            if not whole:
                module.merge()
            new = module.unload_and_optionally_merge_module(True, False, None) if whole else module.get_base_layer()
            setattr(owner, last, new)


SITUATIONS = [
    Situation("forward hook on the attention", after=hook(attention, nothing), fold=lambda b: scale(out(b), 0)),
    Situation("pre-hook on the attention", after=halve_inputs, fold=scale_in),
    Situation("forward put on the attention", after=wrap(attention), fold=lambda b: scale(out(b), -0.5)),
    Situation("adapter around the attention", after=adapt, fold=lambda b: scale(out(b), -0.5)),
    Situation("LoRA (PEFT) in the attention", after=lora, fold=folded_lora),
    Situation("parametrization of the attention", after=parametrize_in, fold=scale_in),
    Situation("another attention", after=replace),
    Situation("hook on the norm", after=hook(norm, lambda x: x * 0.5), fold=lambda b: scale(get(norm(b)), 0.5)),
    Situation("hook on all modules (global)", fold=lambda b: scale(get(norm(b)), 0.5), everywhere=global_hook),
    Situation("forward put on the norm", after=wrap(norm), fold=lambda b: scale(get(norm(b)), -0.5)),
    Situation("parametrization of the norm", after=parametrize_norm, fold=lambda b: scale(get(norm(b)), 0.5)),
    Situation("another norm", after=another_norm, fold=lambda b: scale(get(norm(b)), 0.5)),
    Situation("weights of another tensor class", after=subclass_norm, fold=lambda b: scale(get(norm(b)), 0.5)),
    Situation("hook in the MLP", after=hook(mlp_out, nothing), fold=lambda b: scale(get(mlp_out(b)), 0)),
    Situation("weights offloaded (accelerate)", after=offload),
]
# in either order, but for what says of itself that it comes when the model is ready
SITUATIONS += [
    Situation(f"{s.name}, before the patch", before=s.after, fold=s.fold)
    for s in SITUATIONS
    if s.after not in (None, replace, offload)
]


def near(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-3, atol=1e-4)


def run(family: Family, model: Any) -> Tensor:
    return family.run(model)


@cache  # of the situations, most are two to a fold
def folded(family: Family, fold: Callable[[Any], Any] | None, call: Callable) -> Tensor:
    """Return the answer of a patched model whose weights alone were changed."""
    model = family.make()
    if fold:
        fold(family.block(model))
    return call(family, family.patch(model)).detach()


def outcome(
    situation: Situation, family: Family, call: Callable = run, alike: Callable = near, reference: Callable = run
) -> str:
    """Return what comes of a situation in a family.

    Args:
        call: ``call(family, model)``, how a model runs.
        alike: ``alike(got, want)``, whether two answers are the same.
        reference: how the model runs that has the same in its weights.

    Raises:
        AssertionError: a third thing: other numbers, or an error without a way out.
    """
    where = f"{situation.name}, {family.name}"
    want = folded(family, situation.fold, reference)
    try:
        model = situation.got(family)
        with situation.everywhere(family, model) if situation.everywhere else nullcontext():
            got = call(family, model)
    except (RuntimeError, TypeError, ValueError) as error:
        if not (WAYS_OUT.search(str(error)) and re.search("attention|attn", str(error), re.IGNORECASE)):
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        return REFUSED
    assert alike(got, want), f"{where}: off by {(got - want).abs().max():.3g}"
    if situation.fold:
        assert not alike(folded(family, None, reference), want), f"{where}: changes nothing, and so shows nothing"
    return AS_BEFORE


def table(chosen: list[Family]) -> str:
    """Return the table of all situations in these families, as Markdown."""
    columns: dict[tuple[str, ...], list[str]] = {}  # families of which all is alike share one
    for family in chosen:
        columns.setdefault(tuple(outcome(situation, family) for situation in SITUATIONS), []).append(family.name)
    rows = [["", *("<br>".join(names) for names in columns.values())], ["---"] * (len(columns) + 1)]
    rows += [[situation.name, *cells] for situation, *cells in zip(SITUATIONS, *columns, strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def expected() -> dict[tuple[str, str], str]:
    """Return what the page says, by situation and family."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {
        (row[0], name): cell
        for row in rows
        for names, cell in zip(head[1:], row[1:], strict=True)
        for name in names.split("<br>")
    }


if __name__ == "__main__":
    text = TABLE.read_text()
    TABLE.write_text(text[: text.index("<!-- table -->")] + f"<!-- table -->\n\n{table(list(families()))}\n")
