# SPDX-License-Identifier: Apache-2.0
"""Results of a sweep over r: rows, a table, a chart, a recommendation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import checks
from .config import ToMeConfig
from .table import table


@dataclass(frozen=True)
class SweepRow:
    """Results of one setting.

    Attributes:
        r: the setting as a reader knows it: ``"8"``, ``"(8, 0.5)"``, ``"inference"``; ``"0"``: the unpatched model.
        config: the same for ``apply_tome_patch(model, config=…)``.
        seconds: median time of a call.
        quartiles: of the time, lower and upper, in seconds.
        speedup: median time of the unpatched model ÷ ``seconds``.
        ideal: ideal speed-up, by FLOPs of the blocks alone; None where it is known only when the model runs.
        eta: η, ``speedup`` ÷ ``ideal``; None like it.
        tokens: number of tokens of an item after the last layer; None like ``ideal``.
        items: number of items of an input after the last layer (frames or clips of a video, 1 for an image); None like
            ``ideal``.
        peak_bytes: most bytes that a call holds on the GPU beyond weights and inputs; None on a CPU.
        cosine: cosine between the outputs and those of the unpatched model, mean over items; None with ``evaluate``.
        worst: the smallest of these cosines; None with ``evaluate``.
        score: what ``evaluate`` gave; None without it.
        loss: what is lost against the unpatched model: 1 − ``cosine``, or its score − ``score``.
    """

    r: str
    config: ToMeConfig
    seconds: float
    quartiles: tuple[float, float]
    speedup: float
    ideal: float | None
    eta: float | None
    tokens: int | None
    items: int | None
    peak_bytes: int | None
    cosine: float | None
    worst: float | None
    score: float | None
    loss: float


@dataclass(frozen=True)
class Recommendation:
    """The row that a rule chooses, and why. ``str()`` of it is the reason in one line.

    Attributes:
        row: the row that is chosen; ``row.config`` goes to ``apply_tome_patch(model, config=…)``.
        reason: why, in one line.
    """

    row: SweepRow
    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Sweep:
    """Results of ``stoptome_kernels.sweep``. ``str()`` of it is a table.

    Attributes:
        model: name of the model's class.
        rounds: number of times that each setting was timed.
        rows: a row for each setting; the first is the unpatched model.
    """

    model: str
    rounds: int
    rows: tuple[SweepRow, ...]

    def recommend(self, max_loss: float) -> Recommendation:
        """Choose the fastest row, by median time, among those that lose at most ``max_loss``.

        The unpatched model is among them. So it is chosen where no row that loses so little is faster.

        Args:
            max_loss: 0 or more, in the units of ``SweepRow.loss``: of 1 − cosine, or of the score.

        Returns:
            The row, and the reason as text.

        Raises:
            TypeError, ValueError: ``max_loss`` is no such number.
        """
        most = checks.number(max_loss, "max_loss", "what may be lost: 1 − cosine, or score")
        if not 0 <= most < math.inf:
            raise ValueError(f"max_loss must be 0 or more and finite, got {max_loss!r}")
        allowed = [row for row in self.rows if not _exceeds(row.loss, most)]
        best = min(allowed, key=lambda row: row.seconds)  # of equals the first: the unpatched model
        faster = [row for row in self.rows if row.seconds < best.seconds]
        if best is self.rows[0]:
            reason = f"r = 0: no setting that loses at most {most:g} is faster"
        else:
            reason = f"r = {best.r}: {best.speedup:.2f}× as fast, loses {best.loss:.3g} of at most {most:g}"
        if faster:
            next_best = min(faster, key=lambda row: row.loss)
            reason += f"; r = {next_best.r} is {next_best.speedup:.2f}× as fast and loses {next_best.loss:.3g}"
        return Recommendation(best, reason)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dictionaries of numbers, texts, tuples and None, which ``json.dumps`` takes."""
        return [asdict(row) for row in self.rows]

    def plot(self, to: Any) -> Any:
        """Draw speed-up against cosine or score, a point for each row.

        Args:
            to: path of a picture to write (.png, .svg, .pdf), or matplotlib's ``Axes`` to draw on.

        Returns:
            The ``Axes``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot draws with matplotlib: pip install matplotlib; print(…) is a table") from error
        to_file = isinstance(to, (str, Path))
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.add_subplot() if to_file else to
        scored = self.rows[0].score is not None
        across = [row.speedup for row in self.rows]
        up: list[Any] = [row.score if scored else row.cosine for row in self.rows]
        axes.plot(across, up, "o")
        for row, x, y in zip(self.rows, across, up, strict=True):
            axes.annotate(f"r = {row.r}", (x, y), textcoords="offset points", xytext=(5, 5), size="small")
        axes.set(
            xlabel="times as fast as unpatched", ylabel="score" if scored else "cosine to the unpatched outputs",
            title=self.model,
        )  # fmt: skip
        axes.margins(0.25, 0.15)  # room for names
        if to_file:
            figure.savefig(to)
        return axes

    def __str__(self) -> str:
        rows = self.rows
        columns: dict[str, Sequence[object]] = {
            "r": [row.r for row in rows],
            "ms": [f"{1e3 * row.seconds:.4g}" for row in rows],
            "quartiles": [f"{1e3 * row.quartiles[0]:.4g} to {1e3 * row.quartiles[1]:.4g}" for row in rows],
            "speed-up": [f"{row.speedup:.2f}×" for row in rows],
        }
        if any(row.ideal is not None for row in rows):
            columns["ideal"] = [_cell(row.ideal, "{:.2f}×") for row in rows]
            columns["η"] = [_cell(row.eta, "{:.2f}") for row in rows]
            joins = len({row.items for row in rows if row.items is not None}) > 1
            columns["items × tokens" if joins else "tokens"] = [
                f"{row.items} × {row.tokens}" if joins and row.items else _cell(row.tokens, "{}") for row in rows
            ]
        if any(row.peak_bytes is not None for row in rows):
            columns["peak MiB"] = [
                _cell(None if row.peak_bytes is None else row.peak_bytes / 2**20, "{:.1f}") for row in rows
            ]
        if rows[0].score is None:
            columns["cosine"] = [_cell(row.cosine, "{:.5f}") for row in rows]
            columns["worst"] = [_cell(row.worst, "{:.5f}") for row in rows]
        else:
            columns["score"] = [_cell(row.score, "{:.6g}") for row in rows]
            columns["loss"] = [f"{row.loss:.3g}" for row in rows]
        return "\n".join([f"{self.model}, {self.rounds} rounds", *table(columns)])


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _exceeds(loss: float, most: float) -> bool:
    """Return whether a loss is above a limit by more than rounding: 0.8 − 0.79 is not above 0.01."""
    return loss > most and not math.isclose(loss, most, rel_tol=1e-9, abs_tol=1e-12)
