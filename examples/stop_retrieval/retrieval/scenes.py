# SPDX-License-Identifier: Apache-2.0
"""Synthetic scenes: what happens in a video, and the captions that say so.

A scene is two events, one after the other. An event is a number of shapes of one colour that do one thing. Every
attribute is drawn independently of all others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .errors import UsageError

COUNTS = ("one", "two")
HUES = {"red": 0.0, "green": 1 / 3, "blue": 0.62, "yellow": 1 / 6}  # as a share of the colour circle
SHAPES = ("circle", "triangle", "cross")
MOTIONS = ("moves sideways", "moves up and down", "grows")
KINDS = {"count": COUNTS, "colour": tuple(HUES), "shape": SHAPES, "motion": MOTIONS}
ATTRIBUTES = (*KINDS, "order")
TEMPLATES = ("{0}, then {1}", "first {0}, then {1}", "{0} before {1}", "{0} and after that {1}", "{1} after {0}")


@dataclass(frozen=True)
class Event:
    """``count`` shapes of one colour in one motion."""

    count: str
    colour: str
    shape: str
    motion: str

    def __str__(self) -> str:
        if self.count == "one":
            return f"a {self.colour} {self.shape} {self.motion}"
        verb, _, where = self.motion.partition(" ")
        shapes = self.shape + ("es" if self.shape.endswith("s") else "s")
        return f"{self.count} {self.colour} {shapes} {verb[:-1]} {where}".rstrip()


@dataclass(frozen=True)
class Scene:
    """Two events in their order."""

    first: Event
    second: Event

    def captions(self) -> list[str]:
        """Return what can be said of it, once with each template."""
        return [template.format(self.first, self.second) for template in TEMPLATES]


class Val(NamedTuple):
    """A scene to evaluate on, and which one before it differs from it in a single attribute (None: no such pair)."""

    scene: Scene
    twin: int | None = None
    attribute: str | None = None


def draw_event(rng: np.random.Generator) -> Event:
    """Every attribute by lot, independently."""
    return Event(**{name: kinds[rng.integers(len(kinds))] for name, kinds in KINDS.items()})


def draw_scene(rng: np.random.Generator) -> Scene:
    """Two different events by lot."""
    first = second = draw_event(rng)
    while second == first:
        second = draw_event(rng)
    return Scene(first, second)


def changed(scene: Scene, attribute: str, rng: np.random.Generator) -> Scene:
    """The scene with another value of one attribute, in one of its events; with ``order`` its events swapped."""
    if attribute == "order":
        return Scene(scene.second, scene.first)
    which = ("first", "second")[rng.integers(2)]
    event = getattr(scene, which)
    others = [kind for kind in KINDS[attribute] if kind != getattr(event, attribute)]
    return replace(scene, **{which: replace(event, **{attribute: others[rng.integers(len(others))]})})


def draw_split(train: int, val: int, seed: int) -> tuple[list[Scene], list[Val]]:
    """Scenes to train on and to evaluate on, no scene twice.

    Args:
        train, val: how many. Those to evaluate on are pairs that differ in one attribute, the attributes in turn.

    Raises:
        UsageError: there aren't so many scenes.
    """
    events = math.prod(len(kinds) for kinds in KINDS.values())
    most = events * (events - 1) // 2  # of twice as many that there are: drawing an unused one must not take long
    if train + val > most:
        raise UsageError(f"--synthetic_train {train} and --synthetic_val {val} are more than {most} scenes together")
    rng = np.random.default_rng((seed, 0))
    used: set[Scene] = set()
    vals: list[Val] = []
    while len(vals) < val:
        attribute = ATTRIBUTES[len(vals) // 2 % len(ATTRIBUTES)]
        scene = draw_scene(rng)
        twin = changed(scene, attribute, rng)
        if twin.first == twin.second or used & {scene, twin}:
            continue
        used |= {scene, twin}
        vals += [Val(scene), Val(twin, len(vals), attribute)]
    trains: list[Scene] = []
    while len(trains) < train:
        scene = draw_scene(rng)
        if scene not in used:
            used.add(scene)
            trains.append(scene)
    return trains, vals[:val]
