# SPDX-License-Identifier: Apache-2.0
"""Choosing r: a model's speed, and the loss of its outputs, under several settings."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .patch import apply_tome_patch, describe, remove_tome_patch
from .patching.states import ModuleStates
from .timing import measure_alternately, peak_cuda_bytes
from .tome.config import ToMeConfig
from .tome.fidelity import Outputs
from .tome.schedule import Rate, Rates, Schedule
from .tome.sweep import Sweep, SweepRow

Setting = Rate | str | ToMeConfig
_PLAIN = "0"  # the name of the unpatched model's row


def sweep(
    model: nn.Module,
    inputs: Any = None,
    r: Setting | Iterable[Setting] = (0, 2, 4, 8),
    evaluate: Callable[[Any], float] | None = None,
    *,
    call: Callable[[Any], Any] | None = None,
    seconds: float = 10.0,
    progress: bool | None = None,
    **settings: Any,
) -> Sweep:
    """Measure how much faster a model is under several settings of merging, and what its outputs lose.

    The model runs in eval mode and without gradients. First every setting is put into it, so that one that the model
    refuses is an error before anything runs; then each runs once; then all are timed in turn; then ``evaluate`` is
    called. The unpatched model is always among them, as r = 0, and what the others are compared with. At the end, and
    after any error or Ctrl-C, the model is as it was given: patched as before or not, with its training modes and
    hooks.

    Args:
        model: any model that ``apply_tome_patch`` takes, on a CPU or on CUDA devices.
        inputs: what the model is called with: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments.
        r: the settings: each an int, a list with one int per layer, a pair ``(r, inflection)``, the name of a
            ``ToMeConfig.preset``, or a ``ToMeConfig``.
        evaluate: ``evaluate(model)``, your own score, higher is better; called once for each setting. Without it the
            outputs are compared: the cosine of each item's output to that of the unpatched model. An item is what has
            an index in the first axis. Compared are ``image_embeds`` or ``pooler_output`` where the outputs have them,
            else the first floating-point tensor of at least two numbers per item whose shape no setting changes.
        call: ``call(model)`` in place of ``inputs``, for models that are not run by their forward:
            ``lambda model: model.encode_video(video)``. It may also choose what is compared:
            ``lambda model: model(images).pooler_output``.
        seconds: how long timing lasts, all settings together; each is timed five times at least.
        progress: whether a bar shows on stderr (needs tqdm); None: where tqdm is installed and stderr is a terminal.
        **settings: whatever else ``apply_tome_patch`` takes, the same for every setting: ``prop_attn``, ``unmerge``,
            ``protected``, ``frames`` …

    Returns:
        A row for each setting, the unpatched model first. ``print()`` shows a table, ``.recommend(max_loss)`` chooses,
        ``.plot(path)`` draws.

    Raises:
        TypeError, ValueError, RuntimeError: the arguments, or a setting that the model refuses, which is named; outputs
            that can't be compared; a score that is no finite number.
        ImportError: ``progress=True`` without tqdm.

    Times are of whole calls, with Python's own and with waiting for the device. The ideal speed-up counts the blocks
    alone, so that η is lower the more a call does besides.
    """
    run = _call_of(inputs, call)
    chosen = _settings_of(r)
    for name in settings.keys() & {"tome_r", "config"}:
        raise TypeError(f"{name} is what r says here, with several settings: r=(2, 4), r=[config]")
    seconds = checks.number(seconds, "seconds", "of timing")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be 0 or more and finite, got {seconds!r}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, got {type(evaluate).__name__}")
    _check_model(model)
    devices = _cuda_devices(model)
    given = ModuleStates(model)
    with _Progress(progress, (len(chosen) + 1) * (2 if evaluate is None else 3)) as bar, torch.no_grad():
        try:
            sides = _sides(model, given, chosen, settings)
            _run_once(model, sides, run, evaluate is None, bar)
            samples, peaks = _timed(model, sides, run, seconds, devices, bar)
            scores = {} if evaluate is None else _scores(model, sides, evaluate, bar)
        finally:
            given.put_back()
    rows = [_row(name, side, samples, peaks.get(name), scores) for name, side in sides.items()]
    return Sweep(describe(model).model, len(samples[_PLAIN]), tuple(rows))


@dataclass
class _Side:
    """A setting, put into the model.

    Attributes:
        states: the modules with it.
        config: its settings, as the model holds them.
        schedule: what is merged; None where only a forward tells.
        cosines: mean and least cosine of the outputs to those of the unpatched model; None if they aren't compared.
    """

    states: ModuleStates
    config: ToMeConfig
    schedule: Schedule | None
    cosines: tuple[float, float] | None = None


def _sides(
    model: nn.Module, given: ModuleStates, chosen: Mapping[str, Setting], settings: Mapping[str, Any]
) -> dict[str, _Side]:
    """Return every setting by name, the unpatched model first.

    Raises:
        TypeError, ValueError, RuntimeError: the model refuses one.
    """
    sides = {}
    for name, setting in {_PLAIN: 0, **chosen}.items():
        given.put_back()
        described = _patch(model, name, setting, settings)
        if name == _PLAIN:  # patched for its schedule alone
            given.put_back()
            remove_tome_patch(model)
        model.eval()
        sides[name] = _Side(ModuleStates(model), described.config, described.schedule)
    return sides


def _run_once(
    model: nn.Module, sides: Mapping[str, _Side], run: Callable[[Any], Any], compares: bool, bar: _Progress
) -> None:
    """Run every setting once, and compare the outputs."""
    outputs = Outputs()
    for name, side in sides.items():
        bar.show(f"first run, r = {name}")
        side.states.put_back()
        output = run(model)
        if compares:
            outputs.add(name, output)
        side.states = ModuleStates(model)  # with what the run has made on the modules, such as a cache
        bar.step()
    if compares:
        for name, cosines in outputs.compare().items():
            sides[name].cosines = cosines


def _timed(
    model: nn.Module,
    sides: Mapping[str, _Side],
    run: Callable[[Any], Any],
    seconds: float,
    devices: list[torch.device],
    bar: _Progress,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return seconds of all calls, and, on CUDA devices, the bytes that one takes, by the settings' names."""

    def use(name: str) -> None:
        bar.show(f"timing, r = {name}")
        sides[name].states.put_back()

    def synchronize() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    def call() -> Any:
        return run(model)

    samples = measure_alternately(
        dict.fromkeys(sides, call), seconds, synchronize=synchronize if devices else None, before=use
    )
    peaks = {}
    for name in sides if devices else ():
        use(name)
        peaks[name] = peak_cuda_bytes(call, devices)
    bar.step(len(sides))
    return samples, peaks


def _scores(
    model: nn.Module, sides: Mapping[str, _Side], evaluate: Callable[[Any], float], bar: _Progress
) -> dict[str, float]:
    """Return what ``evaluate`` says of every setting, by their names.

    Raises:
        TypeError, ValueError: that is no finite number.
    """
    scores = {}
    for name, side in sides.items():
        bar.show(f"evaluate, r = {name}")
        side.states.put_back()
        value = evaluate(model)
        try:
            scores[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"evaluate must return a number, got {type(value).__name__} at r = {name}") from error
        if not math.isfinite(scores[name]):
            raise ValueError(f"evaluate must return a finite number, got {scores[name]} at r = {name}")
        bar.step()
    return scores


def _row(
    name: str, side: _Side, samples: Mapping[str, list[float]], peak: int | None, scores: Mapping[str, float]
) -> SweepRow:
    low, middle, high = quantiles(samples[name], n=4, method="inclusive")
    speedup = median(samples[_PLAIN]) / middle
    schedule, score = side.schedule, scores.get(name)
    mean, worst = side.cosines or (None, None)
    return SweepRow(
        r=name,
        config=side.config,
        seconds=middle,
        quartiles=(low, high),
        speedup=speedup,
        ideal=None if schedule is None else schedule.speedup,
        eta=None if schedule is None else speedup / schedule.speedup,
        tokens=None if schedule is None else schedule.tokens[-1],
        items=None if schedule is None else schedule.items[-1],
        peak_bytes=peak,
        cosine=mean,
        worst=worst,
        score=score,
        loss=1 - mean if score is None else scores[_PLAIN] - score,  # type: ignore[operator]  # one of them is there
    )


# arguments


def _call_of(inputs: Any, call: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    """Return what runs a model: ``call``, or the model's forward of the inputs."""
    if (inputs is None) == (call is None):
        raise ValueError("give either inputs or call=lambda model: …")
    if call is not None:
        if not callable(call):
            raise TypeError(f"call must be a function of the model, got {type(call).__name__}")
        return call
    if isinstance(inputs, Tensor):
        return lambda model: model(inputs)
    if isinstance(inputs, tuple):
        return lambda model: model(*inputs)
    if isinstance(inputs, Mapping):
        return lambda model: model(**inputs)
    raise TypeError(
        "inputs must be a tensor, a tuple of arguments or a mapping of keyword arguments, got "
        f"{type(inputs).__name__}; for anything else give call=lambda model: …"
    )


def _settings_of(r: Any) -> dict[str, Setting]:
    """Return the settings that merge anything, by the names of their rows."""
    each = [r] if isinstance(r, (str, ToMeConfig)) or not isinstance(r, Iterable) else list(r)
    if not each:
        raise ValueError("r must have at least one setting, such as r=(2, 4, 8)")
    found: dict[str, Setting] = {}
    for place, setting in enumerate(each):
        try:
            config = _config_of(setting)
        except (TypeError, ValueError) as error:
            hint = "; a pair is one of the settings: r=[(8, 0.5)]" if isinstance(setting, float) else ""
            raise type(error)(f"r[{place}]: {error}{hint}") from error
        if config.off:
            continue  # as unpatched, which is measured in any case
        name = setting if isinstance(setting, str) else _name(config)
        if name in found:
            raise ValueError(f"r has {name} twice: leave one out; one number per layer is one setting: r=[[8, 8, 4]]")
        found[name] = setting
    return found


def _config_of(setting: Setting) -> ToMeConfig:
    if isinstance(setting, ToMeConfig):
        return setting
    return ToMeConfig.preset(setting) if isinstance(setting, str) else ToMeConfig(setting)


def _name(config: ToMeConfig) -> str:
    """Return r as one writes it, and whatever else is not by default."""
    rate = config.tome_r
    named = str(rate)
    if isinstance(rate, Rates):
        named = f"[{rate[0]}] * {len(rate)}" if len(rate) > 1 and len(set(rate)) == 1 else str(list(rate))
    other = [
        f"{field.name}={value!r}"
        for field in fields(config)
        if field.name != "tome_r" and (value := getattr(config, field.name)) != field.default
    ]
    return ", ".join([named, *other])


def _check_model(model: Any) -> None:
    """Raise if a model can't be swept.

    Raises:
        TypeError: it is no module, or a compiled one: torch compiles it anew for each setting and, from the ninth form
            on, runs it as it is without an error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module.__dict__.get("_compiled_call_impl") is not None:
            raise TypeError(
                "model is compiled, and torch would stop compiling after a few settings: sweep it before torch.compile"
            )


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    """Return the CUDA devices that a model is on; none: it is on the CPU.

    Raises:
        ValueError: it is elsewhere.
    """
    found = {tensor.device for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    other = sorted({device.type for device in found} - {"cpu", "cuda"})
    if other:
        raise ValueError(
            f"model has weights on {', '.join(other)}, but sweep measures on CPU and CUDA: move the model there"
        )
    return sorted((device for device in found if device.type == "cuda"), key=lambda device: device.index)


def _patch(model: nn.Module, name: str, setting: Setting, settings: Mapping[str, Any]) -> Any:
    """Patch a model and return its description; what is refused is said with the setting's name."""
    try:
        if isinstance(setting, (str, ToMeConfig)):
            apply_tome_patch(model, config=_config_of(setting), **settings)
        else:
            apply_tome_patch(model, setting, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        if name == _PLAIN:  # the model is refused, whatever the setting
            raise
        kind = next(kind for kind in (TypeError, ValueError, RuntimeError) if isinstance(error, kind))
        raise kind(f"r = {name}: {error}") from error
    return describe(model)


class _Progress:
    """A bar of tqdm, or nothing."""

    def __init__(self, wanted: bool | None, steps: int):
        self._bar: Any = None
        if wanted is False or (wanted is None and not (sys.stderr is not None and sys.stderr.isatty())):
            return
        try:
            from tqdm import tqdm
        except ImportError as error:
            if wanted:
                raise ImportError("progress=True shows a bar of tqdm: pip install tqdm, or leave it out") from error
            return
        self._bar = tqdm(total=steps, leave=False)

    def show(self, what: str) -> None:
        """Say what is done now."""
        if self._bar is not None:
            self._bar.set_description(what)

    def step(self, count: int = 1) -> None:
        """Go on by so many steps."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
