# SPDX-License-Identifier: Apache-2.0
"""Trained weights put into other classes, pictures, scores of features, and a golden vector of merged ones."""

import sys

import numpy as np
import pytest
import stoptome_kernels as stk
import torch
from PIL import Image

from harness import datasets, libraries  # noqa: F401  # before timm
from harness.intervals import mean_interval, share_interval
from harness.trained import dinov2, pictures, scores
from harness.workloads import fidelity as work
from support import ROOT
from support import dinov2 as small

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


def test_one_layer_alone_merges():
    tokens = work.one_layer(6).schedule(layers=12, tokens=257).tokens
    assert tokens == (257,) * 6 + (225,) * 6


def test_merged_models_share_their_weights_and_leave_the_model_alone(weights):
    model = dinov2.timm_model(weights)
    side = work.merged(model, stk.ToMeConfig(8), work.SIZES_OFF)
    assert side.model.pos_embed is model.pos_embed
    assert stk.is_patched(side.model)
    assert not stk.is_patched(model)
    assert not stk.describe(side.model).config.prop_attn


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
