# SPDX-License-Identifier: Apache-2.0
"""Refusals of sweeps, and the model afterwards, which is as before whatever happens."""

import pytest
import stoptome_kernels as stk
import torch
from torch import nn

from support.sweep import CLIPS, TOKENS, encoder, looks, same_looks, stop_model, video


class Stop(BaseException):
    """An end in the middle, as by Ctrl-C."""


def failing(at: int, error: type[BaseException]):
    """A call of the model that fails the ``at``-th time."""
    calls = []

    def call(model):
        calls.append(None)
        if len(calls) == at:
            raise error("in the middle")
        return model(TOKENS)

    return call


def as_given(model: nn.Module) -> nn.Module:
    return model


def patched(model: nn.Module) -> nn.Module:
    return stk.apply_tome_patch(model, 5, prop_attn=False, protected=2)


@pytest.mark.parametrize("prepare", [as_given, patched])
@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({"inputs": TOKENS}, None),
        ({"fails": 1}, Stop),
        ({"fails": 3}, KeyboardInterrupt),
        ({"fails": 9}, ValueError),
        ({"inputs": TOKENS, "evaluate": lambda model: 1 / 0}, ZeroDivisionError),
        ({"inputs": TOKENS, "evaluate": lambda model: float("nan")}, ValueError),
        ({"inputs": TOKENS, "r": (2, [1] * 4)}, ValueError),
        ({"call": lambda model: model(TOKENS) * 0}, ValueError),
    ],
)
def test_the_model_is_as_before(prepare, how, error):
    """Classes, attributes, training modes, hooks and parameters are the same objects, whatever happened."""
    if "fails" in how:
        how = {"call": failing(how["fails"], error)}
    model = prepare(encoder())
    model.layers[1].eval()
    handle = model.layers[0].linear1.register_forward_hook(lambda *_: None)
    before, rng = looks(model), torch.get_rng_state()
    if error is None:
        stk.sweep(model, r=(2, 4), seconds=0, **how)
    else:
        with pytest.raises(error):
            stk.sweep(model, **{"r": (2, 4), "seconds": 0, **how})
    assert same_looks(before, looks(model))
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.is_grad_enabled()
    handle.remove()
    assert not model.layers[0].linear1._forward_hooks


@pytest.mark.parametrize("given", [None, CLIPS, stk.ToMeConfig(1)])
def test_a_video_model_is_as_before(given):
    """Joined frames bring parameters, which come and go, and keep their trained numbers."""
    model = stop_model()
    if given is not None:
        stk.apply_tome_patch(model, config=given)
        for name, parameter in model.named_parameters():
            if "tome_frame_embedding" in name:
                nn.init.normal_(parameter)
    before = looks(model)
    stk.sweep(model, call=lambda model: model.encode_video(video()), r=(2, CLIPS), seconds=0)
    assert same_looks(before, looks(model))


def test_what_evaluate_leaves_on_the_model_goes():
    model = encoder()
    before = looks(model)

    def evaluate(model):
        model.layers[0].register_forward_hook(lambda *_: None)
        model.note = nn.Linear(1, 1)
        model.train()
        return 1.0

    stk.sweep(model, TOKENS, 2, evaluate, seconds=0)
    assert same_looks(before, looks(model))


def test_caches_of_a_first_run_are_kept_while_timing():
    """And are gone afterwards."""

    class Caching(nn.Module):
        def forward(self, x):
            self.table = 1.0
            return x

    model, cold = encoder(), []
    model.norm = Caching()

    def call(model):
        cold.append("table" not in model.norm.__dict__)
        return model(TOKENS)

    stk.sweep(model, call=call, r=(2, 4), seconds=0)
    assert cold == [True] * 3 + [False] * 18
    assert "table" not in model.norm.__dict__


# refused


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ValueError, r"give either inputs or call=lambda model: …"),
        ({"inputs": TOKENS, "call": len}, ValueError, "give either inputs or call"),
        ({"inputs": [TOKENS]}, TypeError, "inputs must be a tensor, a tuple .* got list; .* call=lambda"),
        ({"call": 3}, TypeError, "call must be a function of the model, got int"),
        ({"inputs": TOKENS, "evaluate": 3}, TypeError, "evaluate must be a function of the model, got int"),
        ({"inputs": TOKENS, "r": ()}, ValueError, "r must have at least one setting"),
        ({"inputs": TOKENS, "r": (8, 0.5)}, TypeError, r"r\[1\]: .*; a pair is one of the settings: r=\[\(8, 0.5\)\]"),
        ({"inputs": TOKENS, "r": (2, -1)}, ValueError, r"r\[1\]: tome_r must be 0 or more"),
        ({"inputs": TOKENS, "r": "fast"}, ValueError, r"r\[0\]: preset must be one of 'training'"),
        ({"inputs": TOKENS, "r": [2, 2]}, ValueError, r"r has 2 twice: .* r=\[\[8, 8, 4\]\]"),
        ({"inputs": TOKENS, "r": (2, [1] * 4)}, ValueError, r"r = \[1\] \* 4: tome_r has 4 numbers, but .* 3 layers"),
        ({"inputs": TOKENS, "r": "memory"}, ValueError, "r = memory: merge_layers is for STOP"),
        ({"inputs": TOKENS, "seconds": float("inf")}, ValueError, "seconds must be 0 or more and finite, got inf"),
        ({"inputs": TOKENS, "seconds": "1"}, TypeError, "seconds must be a float"),
        ({"inputs": TOKENS, "evaluate": lambda _: "a"}, TypeError, "evaluate must return a number, got str at r = 0"),
        ({"inputs": TOKENS, "evaluate": lambda _: -torch.inf}, ValueError, "finite number, got -inf at r = 0"),
        ({"call": lambda model: None}, ValueError, "outputs can't be compared, since they have no .* evaluate=…"),
        ({"call": lambda model: model(TOKENS)[:, 0, :1]}, ValueError, "since they have no floating-point tensor"),
        ({"call": lambda model: model(TOKENS) * 0}, ValueError, "zero or not finite at r = 0: give evaluate"),
        ({"call": lambda model: model(TOKENS) / 0}, ValueError, "zero or not finite at r = 0"),
        ({"call": lambda model: torch.randn(2, 5 - stk.is_patched(model))}, ValueError, "they change their shape"),
        ({"inputs": TOKENS, "tome_r": 3}, TypeError, "tome_r is what r says here"),
        ({"inputs": TOKENS, "config": CLIPS, "r": 0}, TypeError, "config is what r says here"),
        ({"inputs": TOKENS, "frames": 3}, ValueError, "^frames is for STOP"),
    ],
)  # fmt: skip
def test_refused(arguments, error, said):
    with pytest.raises(error, match=said):
        stk.sweep(encoder(), seconds=arguments.pop("seconds", 0), **arguments)


def test_a_refused_setting_comes_before_any_run():
    runs = []
    with pytest.raises(ValueError, match="r = memory"):
        stk.sweep(encoder(), call=runs.append, r=(2, "memory"))
    assert runs == []


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        stk.sweep(3, TOKENS)
    with pytest.raises(ValueError, match="weights on meta, but sweep measures on CPU and CUDA"):
        stk.sweep(encoder().to("meta"), TOKENS)
    with pytest.raises(TypeError, match=r"^can't merge tokens in Linear"):
        stk.sweep(nn.Linear(2, 2), TOKENS)


@pytest.mark.slow  # imports torch's compiler
@pytest.mark.compiled
def test_compiled_models_are_refused():
    inside = encoder()
    inside.layers[0].compile()
    for model in (torch.compile(encoder()), inside):
        with pytest.raises(TypeError, match=r"model is compiled.*sweep it before torch\.compile"):
            stk.sweep(model, TOKENS)
