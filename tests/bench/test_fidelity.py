# SPDX-License-Identifier: Apache-2.0
"""bench/fidelity.py: its rows, what it refuses, and the tables, charts and advice made of the rows."""

import json

import pytest
import stoptome_kernels as stk
import torch

import fidelity
import plot
from charts import fidelity as charts
from harness import datasets, libraries  # noqa: F401  # before timm
from harness.trained import dinov2, pictures
from harness.workloads import fidelity as work
from support import dinov2 as small

pytestmark = pytest.mark.usefixtures("machine")
FIXED = torch.randn(1, work.FRAMES, 3, 224, 224, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def command(monkeypatch, weights):
    """The command on random weights and random pictures."""
    rng = torch.Generator().manual_seed(1)

    def shown(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 3, 224, 224, generator=rng)

    monkeypatch.setattr(dinov2, "read", lambda: None)
    monkeypatch.setattr(dinov2, "weights_of", lambda model: weights)
    monkeypatch.setattr(dinov2, "run_onnx", lambda model, given: small.run_plainly(weights, given))
    monkeypatch.setattr(pictures, "photos", lambda count: shown(count))
    monkeypatch.setattr(pictures, "digits", lambda each: pictures.Labelled(shown(4), torch.tensor([0, 0, 1, 1])))
    monkeypatch.setattr(pictures, "small_pictures", lambda count: pictures.Labelled(shown(3), torch.tensor([0, 0, 1])))
    monkeypatch.setattr(pictures, "clips", lambda *_: pictures.Clips(shown(3, work.FRAMES), torch.tensor([0, 1, 1])))

    def measure(sides, device, seconds, graph):
        """Run each side once; the unpatched model, which is first, takes 6 ms, the others 3, 4, … ms."""
        for (call,) in sides.values():
            call()
        return {name: {"samples": [1e3 * (2 + place if place else 6)]} for place, name in enumerate(sides)}

    monkeypatch.setattr(fidelity, "measure", measure)

    def run(*argv: str) -> int:
        return fidelity.main(["--quick", *argv])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder.layer.5.mlp.fc2.weight", "decoder.bn2.running_mean", "cls_token"])
def test_weights_in_the_wrong_place_are_not_measured(command, weights, monkeypatch, capsys, part):
    name = next(name for name in weights if name.endswith(part))
    wrong = weights | {name: weights[name].flip(-1)}
    monkeypatch.setattr(dinov2, "weights_of", lambda model: wrong)
    assert command("--parts", "layers") == 1
    assert "differs from onnxruntime" in capsys.readouterr().err


@pytest.mark.slow
def test_a_film_tower_that_differs_is_not_measured(command, monkeypatch, capsys):
    monkeypatch.setattr(work, "film_frames", lambda tower, frames: tower(frames, work.FRAMES).flip(1))
    assert command("--parts", "layers") == 1
    assert "the film tower differs from onnxruntime" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(dinov2, "read", lambda: datasets.folder("no_such_package"))
    assert fidelity.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        'error: no_such_package is not installed: pip install ".[fidelity,vit]", or make fidelity\n'
    )


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # 44 models are patched and run, each on few pictures
def test_rows_table_and_chart(command, tmp_path):
    file, page, chart, own = (tmp_path / name for name in ("rows.json", "table.md", "chart.png", "own.png"))
    assert command("--json", str(file), "--plot", str(own)) == 0
    found = json.loads(file.read_text())
    rows = {(row["op"], row["shape"], row["impl"], row["dtype"]): row for row in found}
    assert len(rows) == len(found)

    def are_different(name, *keys):
        return len({rows[key][name] for key in keys}) == len(keys)

    by_method = [("photos", "r=8", method, "float32") for method in work.METHODS]
    merging = rows[by_method[0]]
    for key in by_method:
        row = rows[key]
        assert (row["tokens_in"], row["tokens_out"], row["n"]) == (257, 161, 2)
        assert row["eta"] == pytest.approx(row["speedup"] / row["speedup_ideal"], abs=2e-4)
        assert row["speedup"] == pytest.approx(6e3 / row["p50_us"], abs=1e-4)
        assert row["speedup_ideal"] == round(stk.ToMeConfig(8).schedule(12, 257, width=small.WIDTH).speedup, 4)
        kept = ("class",) if key[2] == "drop" else ("class", "patch", "saliency", "top")
        assert {name.removesuffix("_mean") for name in row if name.endswith("_mean")} == set(kept), "dropped: no map"
        for name in kept:
            low, high = row[f"{name}_interval"]
            assert low <= row[f"{name}_mean"] <= high
            assert 0 < row[f"{name}_median"] <= row[f"{name}_worst"]
            if row is not merging:
                low, high = row[f"{name}_over_merging_interval"]
                apart = row[f"{name}_mean"] - merging[f"{name}_mean"]
                assert low + high == pytest.approx(2 * apart, abs=1e-9)
    assert "class_over_merging_interval" not in merging
    assert [rows[key]["p50_us"] for key in by_method] == [3e3, 4e3, 5e3, 6e3, 7e3], "each its own time"
    assert are_different("class_mean", *by_method)
    assert rows["photos", "another picture", "none", "float32"]["class_worst"] > 0.001

    rising = rows["photos", "r=8 rising", "merge", "float32"]
    assert (rising["tome_r"], merging["tome_r"]) == ("(8, 1.0)", "8")
    share = (rising["speedup_ideal"] - 1) / (merging["speedup_ideal"] - 1)
    low, high = rising["over_constant_interval"]
    assert (low + high) / 2 == pytest.approx(rising["class_mean"] - share * merging["class_mean"], abs=1e-4)

    for library in work.MODELS:
        plain, exact = (
            rows[f"photos, {library}", name, by, "float32"] for name, by in (("r=0", "none"), ("r=8", "merge"))
        )
        assert plain["class_worst"] < 1e-6
        for name in ("class", "patch", "saliency"):
            assert exact[f"{name}_mean"] == pytest.approx(merging[f"{name}_mean"], abs=1e-4)
        rounded = rows[f"photos, {library}", "r=0", "none", "bfloat16"]["class_mean"]
        assert 1e-7 < rounded < 1e-3
        assert rows[f"photos, {library}", "r=8", "merge", "bfloat16"]["class_mean"] == pytest.approx(
            exact["class_mean"], abs=1e-2
        )
    assert rows["one layer", "layer 7", "merge", "float32"]["tokens_out"] == 225
    for op, count in (("digits", 4), ("small pictures", 3)):
        keys = [(op, "r=8", method, "float32") for method in work.METHODS]
        assert are_different("class_mean", *keys)
        assert {rows[key]["n"] for key in keys} == {count}

    assert rows["films", "the next frame", "none", "float32"]["class_median"] > 0.001
    joined = [("films", "preset memory", method, "float32") for method in fidelity.film_methods("preset memory")]
    assert len(joined) == 3
    for name in ("class_mean", "clip_mean"):
        assert are_different(name, *joined)
        assert min(rows[key][name] for key in joined) > 1e-4
    assert {(rows[key]["items_out"], rows[key]["n"]) for key in joined} == {(1, 1)}

    assert plot.main(["fidelity", str(file), "--chart", str(chart), "--table", str(page)]) == 0
    text = page.read_text()
    for heading in ("Merging on photographs", "Ways to have fewer tokens", "One layer alone", "Both libraries",
                    "Nearest neighbours of handwritten digits", "Clips of films"):  # fmt: skip
        assert f"### {heading}" in text
    assert chart.read_bytes() == own.read_bytes()
    assert chart.stat().st_size > 5000


@pytest.mark.slow
def test_random_pairs_of_films_do_not_hang_on_the_clock(command, monkeypatch, tmp_path):
    """Timing draws from the generator, so often as there is time; what is shown is drawn anew."""
    found = []
    measure = fidelity.measure
    for times in (1, 3):
        monkeypatch.setattr(
            fidelity, "measure", lambda sides, *rest, times=times: [measure(sides, *rest) for _ in range(times)][-1]
        )
        torch.manual_seed(0)
        monkeypatch.setattr(pictures, "clips", lambda *_: pictures.Clips(FIXED, torch.tensor([0])))
        file = tmp_path / f"{times}.json"
        assert command("--parts", "films", "--json", str(file)) == 0
        found.append({(row["shape"], row["impl"]): row["class_mean"] for row in json.loads(file.read_text())})
    assert found[0] == found[1]


@pytest.mark.slow
def test_each_dtype_is_compared_with_itself(command, monkeypatch, tmp_path):
    def in_dtype(model, dtype, cast=work.in_dtype):
        """Return what computes the opposite features, for bfloat16."""
        model = cast(model, torch.float32)
        if dtype is torch.bfloat16:
            for parameter in list(model.parameters())[-2:]:  # of the last norm
                parameter.data.neg_()
        return model

    monkeypatch.setattr(work, "in_dtype", in_dtype)
    file = tmp_path / "rows.json"
    assert command("--parts", "libraries", "--json", str(file)) == 0
    lost = {(row["op"], row["shape"], row["dtype"]): row["class_mean"] for row in json.loads(file.read_text())}
    for library in work.MODELS:
        assert lost[f"photos, {library}", "r=0", "bfloat16"] > 1.9, "against float32"
        assert lost[f"photos, {library}", "r=8", "bfloat16"] == pytest.approx(
            lost[f"photos, {library}", "r=8", "float32"], abs=1e-6
        ), "against itself"


def test_a_chart_needs_the_photographs(capsys):
    with pytest.raises(SystemExit):
        fidelity.main(["--parts", "layers", "--plot", "chart.png"])
    assert "argument --plot: the chart is of photos" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("r", "text"), [(13, "13"), ((13, -1.0), "(13, -1.0)"), ([0, 0, 20], "[0, 0, 20]"), ([8, 4], "[8, 4]")]
)
def test_r_is_written_as_a_user_writes_it(r, text):
    assert fidelity.written(stk.ToMeConfig(r).tome_r) == text


def photo_row(r, ideal, median, **more):
    where = {"device": "CPU", "device_kind": "cpu", "torch": "2.13", "threads": 2, "cpus": 2, "pages": None,
             "triton": None, "driver": None, "dtype": "float32", "date": "2026-01-01", "op": "photos", "shape": "r",
             "impl": "merge", "n": 34, "tokens_in": 257, "tokens_out": 100, "speedup": 1.5}  # fmt: skip
    lost = {f"{name}_{kind}": value for name in ("class", "patch", "saliency")
            for kind, value in (("median", median), ("mean", 2 * median), ("worst", 0.25))}  # fmt: skip
    return where | lost | {"tome_r": r, "speedup_ideal": ideal} | more


def test_the_fastest_that_loses_so_little_is_advised():
    settings = [
        ("4", 1.1, 0.0004),
        ("(8, 1.0)", 1.2, 0.0005),
        ("8", 1.25, 0.0049),
        ("13", 1.24, 0.004),
        ("20", 1.9, 0.1),
    ]
    rows = [photo_row(*setting) for setting in settings]
    rows.append(photo_row("20", 9, 0.0001, impl="drop"))
    rows.append(photo_row("(9, -1.0)", 1.8, 0.0049, speedup=1.4))  # beaten by 4, that was faster and loses less
    lines = [line.split(" | ") for line in charts.advice(rows).splitlines() if "tome_r" in line]
    assert [line[:2] for line in lines] == [["| 0.5", "`tome_r=(8, 1.0)`"], ["| 5", "`tome_r=8`"]]
    assert lines[0][4] == "0.5 (1, 250)", "median, mean, worst, in thousandths"
    assert charts.advice([]) == "*Not measured.*"


@pytest.mark.parametrize(
    ("loss", "text"), [(0, "0"), (1e-9, "0"), (1.234e-5, "0.012"), (0.00123, "1.2"), (0.0094, "9.4"), (0.41, "410")]
)
def test_thousandths(loss, text):
    assert charts.thousandths(loss) == text


@pytest.mark.parametrize(("more", "mark"), [((0.01, 0.03), "*"), ((-0.03, -0.01), "†"), ((-0.01, 0.03), "")])
def test_what_differs_from_merging_is_marked(more, mark):
    row = photo_row("8", 1.2, 0.001, class_over_merging_interval=more)
    assert charts._beside_merging(row, "class") == f"1 (2, 250){mark}"
