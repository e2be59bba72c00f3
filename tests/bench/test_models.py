# SPDX-License-Identifier: Apache-2.0
"""bench/models.py runs, its rows hold what they promise, and it refuses wrong results."""

import json

import pytest
import torch

import models
import plot
from harness.baselines import vit as eager_vit
from harness.verify import WrongResult
from harness.workloads import DIRECTIONS, Side

pytestmark = pytest.mark.usefixtures("machine")
SMALL = ["--layers", "2", "--batch", "1", "--seconds", "0.1", "--modes", "plain"]


@pytest.mark.slow
def test_rows_chart_and_table(tmp_path, capsys):
    file, chart, page = (tmp_path / name for name in ("rows.json", "chart.png", "table.md"))
    names = ["ViT-S/16", "CLIP ViT-B/32 (open_clip)"]
    assert models.main([*SMALL, "--json", str(file), "--models", *names, "--direction", "inference", "training"]) == 0
    assert "ViT-S/16" in capsys.readouterr().out
    rows = {(row["shape"], row["direction"], row["impl"]): row for row in json.loads(file.read_text())}
    assert set(rows) == {(n, d, i) for n in names for d in DIRECTIONS for i in models.IMPLS}
    for (name, _, impl), row in rows.items():
        model = models.MODELS[name]
        assert row["tokens_out"] == model.tokens - (0 if impl == "unpatched" else 2 * model.r)
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
        assert row["eta"] == pytest.approx(row["speedup"] / row["speedup_ideal"], abs=2e-4)
        assert row["images_per_s"] == pytest.approx(1e6 / row["p50_us"], abs=1e-3)
        assert (row["speedup_ideal"] > 1) == (impl != "unpatched")
        if impl == "unpatched":
            continue
        # by hand: a layer that merges nothing, and the two that merge r each
        tokens, r, width = model.tokens, model.r, model.width
        layers = [
            t * (8 * width**2 + 4 * t * width) + u * 16 * width**2
            for t, u in ((tokens, tokens), (tokens, tokens - r), (tokens - r, tokens - 2 * r))
        ]
        pixels = 2 * 3 * 224 * 224 * width
        assert row["speedup_ideal"] == pytest.approx(
            (2 * layers[0] + pixels) / (layers[1] + layers[2] + pixels), abs=1e-4
        )
        assert row["speedup_ideal_blocks"] == pytest.approx(2 * layers[0] / (layers[1] + layers[2]), abs=1e-4)
    assert plot.main(["models", str(file), "--chart", str(chart), "--table", str(page)]) == 0
    assert chart.stat().st_size > 5000
    assert page.read_text().count("| 197 → 171, r = 13 |") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP ViT-B/32 (transformers)", "VideoMAE-B"])
def test_sides_are_the_same_model(name):
    """VideoMAE's head is a mean: the eager side has to weigh, or it is another model than the package's."""
    args = models.arguments([*SMALL, "--layers", "1"])
    models.check(name, models.sides(models.MODELS[name], args), "float32")


def test_wrong_results_are_not_timed(monkeypatch, capsys):
    def wrong(metric, x, column, r, protected):
        return x[:, : x.shape[1] - r], column[:, : x.shape[1] - r]

    monkeypatch.setattr(eager_vit, "eager_both", wrong)
    assert models.main([*SMALL, "--models", "CLIP ViT-B/32 (open_clip)"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        "error: wrong result, nothing more is timed: CLIP ViT-B/32 (open_clip): eager plain: a row's"
    )
    side = Side("eager", "plain", lambda: torch.full((2, 3), torch.nan), ())
    with pytest.raises(WrongResult):
        models.check("a model", [side], "float32")


def test_a_library_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(models, "installed", lambda library: False)
    assert models.main([*SMALL, "--models", "ViT-S/16"]) == 2
    said = capsys.readouterr()
    assert "timm is not installed, left out" in said.out
    assert "pip install" in said.err
