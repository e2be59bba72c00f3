# SPDX-License-Identifier: Apache-2.0
"""The synthetic text-video set: its captions are true, its splits are apart, its files are the same again."""

import csv
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from retrieval import drawing, scenes, synthetic
from retrieval.errors import UsageError
from retrieval.scenes import Event, Scene

SIZE, FRAMES = 64, 24
PLAIN = Event("one", "red", "circle", "moves sideways")
OTHER = Event("two", "blue", "triangle", "moves up and down")


def shown(event: Event, seed: int) -> np.ndarray:
    """Where the shapes of an event are in each frame before the second event begins, as it is drawn: (frames, H, W)
    float in 0..1. Two scenes that differ in the colour of the event differ where it is drawn."""
    films = [
        drawing.render(Scene(dataclasses.replace(event, colour=colour), OTHER), np.random.default_rng(seed))
        for colour in ("yellow", "blue")
    ]
    difference = np.abs(films[0].astype(float) - films[1]).max(-1) / 255
    return difference[difference.any((1, 2))]


def centres(event: Event, seed: int) -> np.ndarray:
    """(frames, 2): x and y of what is drawn, in pixels."""
    mask = shown(event, seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.stack([(mask * axis).sum((1, 2)) / mask.sum((1, 2)) for axis in (x, y)], 1)


def parts(mask: np.ndarray) -> int:
    """Connected regions of a (H, W) bool mask."""
    mask, number = mask.copy(), 0
    while mask.any():
        number += 1
        todo = [tuple(np.argwhere(mask)[0])]
        while todo:
            y, x = todo.pop()
            if 0 <= y < SIZE and 0 <= x < SIZE and mask[y, x]:
                mask[y, x] = False
                todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return number


def decoded(path: os.PathLike | str) -> np.ndarray:
    with av.open(os.fspath(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


# -- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", scenes.HUES)
def test_colour_is_the_hue_of_the_shapes(colour):
    event = dataclasses.replace(PLAIN, colour=colour)
    for seed in range(5):
        film = drawing.render(Scene(event, OTHER), np.random.default_rng(seed))
        inside = shown(event, seed) > 0.6
        pixels = film[: len(inside)][inside].astype(float)
        brightest = np.median(pixels, 0).argsort()[::-1]
        expected = {"red": [0], "yellow": [0, 1], "green": [1], "blue": [2]}[colour]
        assert sorted(brightest[: len(expected)]) == expected
        low = np.median(pixels, 0)[brightest[len(expected)]]
        assert np.median(pixels, 0)[brightest[len(expected) - 1]] - low > 60


@pytest.mark.parametrize("motion", scenes.MOTIONS)
@pytest.mark.parametrize("count", scenes.COUNTS)
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_count_is_the_number_of_regions_inside_the_frame(count, shape, motion):
    for seed in range(2):
        masks = shown(Event(count, "red", shape, motion), seed) > 0.4
        assert {parts(mask) for mask in masks} == {1 + scenes.COUNTS.index(count)}
        if motion == "grows":  # at its largest it may touch the border
            masks = masks[: len(masks) * 3 // 4]
        border = masks[:, [0, -1], :].sum() + masks[:, :, [0, -1]].sum()
        assert border == 0, "a shape leaves the frame"


@pytest.mark.parametrize("count", scenes.COUNTS)
def test_moving_shapes_go_as_the_caption_says_one_way_or_the_other(count):
    for motion, axis in {"moves sideways": 0, "moves up and down": 1}.items():
        ways = set()
        for seed in range(6):
            track = centres(Event(count, "red", "circle", motion), seed)
            along, across = track[:, axis], track[:, 1 - axis]
            assert abs(along[-1] - along[0]) > 0.45 * SIZE
            assert np.ptp(across) < 1
            steps = np.sign(np.diff(along))
            assert abs(steps.sum()) == len(steps), "it stands still or turns back"
            ways.add(steps[0])
        assert ways == {-1, 1}


def test_growing_changes_the_area_and_not_the_place():
    for seed in range(3):
        event = Event("two", "green", "circle", "grows")
        assert (np.diff(shown(event, seed).sum((1, 2))) > 0).all()
        assert np.abs(np.diff(centres(event, seed), axis=0)).max() < 0.5


def test_no_frame_by_itself_tells_how_a_shape_moves():
    """A shape that moves sideways stands where one that moves up and down stands as well."""
    x, y = np.concatenate([centres(Event("one", "red", "circle", "moves sideways"), seed) for seed in range(30)]).T
    u, v = np.concatenate([centres(Event("one", "red", "circle", "moves up and down"), seed) for seed in range(30)]).T
    for one, other in ((x, u), (y, v)):
        assert one.min() < other.mean() < one.max()
        assert abs(one.mean() - other.mean()) < 0.1 * SIZE


def test_shapes_differ_in_outline():
    masks = {shape: shown(Event("one", "red", shape, "moves sideways"), 1)[0] > 0.4 for shape in scenes.SHAPES}
    areas = [mask.sum() for mask in masks.values()]
    assert max(areas) < 1.7 * min(areas), "area alone would tell the shape"
    for a, left in masks.items():
        for b, right in masks.items():
            if a != b:
                assert (left & right).sum() / (left | right).sum() < 0.85


def test_order_decides_which_half_shows_which_event():
    red, blue = Event("one", "red", "circle", "grows"), Event("one", "blue", "circle", "grows")
    for seed in range(5):
        films = [drawing.render(scene, np.random.default_rng(seed)) for scene in (Scene(red, blue), Scene(blue, red))]
        redder = films[0][..., 0].astype(int) - films[1][..., 0]
        begin, end = redder[: FRAMES // 3].reshape(FRAMES // 3, -1), redder[-FRAMES // 3 :].reshape(FRAMES // 3, -1)
        assert (begin.max(1) > 60).all()
        assert (begin.min(1) > -60).all()
        assert (end.min(1) < -60).all()
        assert (end.max(1) < 60).all()


def test_background_moves_and_does_not_depend_on_the_caption():
    pair = Scene(PLAIN, OTHER), Scene(Event("two", "green", "cross", "grows"), PLAIN)
    films = [drawing.render(scene, np.random.default_rng(7)).astype(int) for scene in pair]
    same = (films[0] == films[1]).all(-1)
    assert same.mean() > 0.6
    assert (np.abs(np.diff(films[0], axis=0)).max(-1)[same[1:] & same[:-1]] > 0).mean() > 0.3
    assert (films[0] != drawing.render(pair[0], np.random.default_rng(8))).mean() > 0.9


# -- what is said -----------------------------------------------------------------------------------------------------


def test_captions_say_the_events_in_their_order():
    scene = Scene(Event("two", "red", "circle", "moves sideways"), Event("one", "green", "triangle", "grows"))
    assert scene.captions()[0] == "two red circles move sideways, then a green triangle grows"
    assert "a green triangle grows after two red circles move sideways" in scene.captions()
    assert str(Event("two", "blue", "cross", "grows")) == "two blue crosses grow"
    for caption, swapped in zip(scene.captions(), Scene(scene.second, scene.first).captions(), strict=True):
        assert caption != swapped


def test_splits_share_no_scene_and_no_caption():
    train, val = scenes.draw_split(400, 200, seed=1)
    told = train + [pair.scene for pair in val]
    assert (len(train), len(val)) == (400, 200)
    assert len(set(told)) == 600
    captions = [caption for scene in told for caption in scene.captions()]
    assert len(set(captions)) == len(captions)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_differ_in_the_one_attribute_that_is_noted(seed):
    _, val = scenes.draw_split(1, 101, seed)
    noted = []
    for i, (scene, twin, attribute) in enumerate(val):
        assert (twin is None) == (i % 2 == 0)
        if twin is None:
            continue
        noted.append(attribute)
        before = val[twin].scene
        if attribute == "order":
            assert (scene.first, scene.second) == (before.second, before.first)
            continue
        changes = [
            name
            for one, other in zip(dataclasses.astuple(scene), dataclasses.astuple(before), strict=True)
            for name, a, b in zip(("count", "colour", "shape", "motion"), one, other, strict=True)
            if a != b
        ]
        assert changes == [attribute]
    assert {name: noted.count(name) for name in scenes.ATTRIBUTES} == dict.fromkeys(scenes.ATTRIBUTES, 10)


def test_every_value_is_drawn_as_often_as_any_other():
    train, _ = scenes.draw_split(2500, 2, seed=0)
    for which in ("first", "second"):
        for name, kinds in scenes.KINDS.items():
            drawn = [getattr(getattr(scene, which), name) for scene in train]
            expected = 2500 / len(kinds)
            assert all(abs(drawn.count(kind) - expected) < 5 * expected**0.5 for kind in kinds)


def test_more_scenes_than_there_are():
    with pytest.raises(UsageError, match=r"--synthetic_train 90000 and --synthetic_val 2 are more than \d+ scenes"):
        scenes.draw_split(90000, 2, seed=0)


# -- files ------------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> synthetic.Paths:
    return synthetic.write(tmp_path_factory.mktemp("set") / "new" / "videos", train=9, val=7, seed=4)


def test_layout_is_that_of_msrvtt(made):
    data = json.loads(Path(made.data_path).read_text())
    videos = {video["video_id"]: video for video in data["videos"]}
    assert list(videos) == [f"video{i}" for i in range(16)]
    assert [v["split"] for v in videos.values()] == ["train"] * 9 + ["test"] * 7
    assert sorted(os.listdir(made.features_path)) == sorted(f"{name}.mp4" for name in videos)
    assert [s["sen_id"] for s in data["sentences"]] == list(range(9 * synthetic.CAPTIONS + 7))
    said = {name: [s["caption"] for s in data["sentences"] if s["video_id"] == name] for name in videos}
    assert [len(set(said[name])) for name in videos] == [synthetic.CAPTIONS] * 9 + [1] * 7
    with open(made.train_csv) as file:
        assert [row["video_id"] for row in csv.DictReader(file)] == [f"video{i}" for i in range(9)]
    with open(made.val_csv) as file:
        rows = list(csv.DictReader(file))
    assert [row["video_id"] for row in rows] == [f"video{i}" for i in range(9, 16)]
    assert [row["sentence"] for row in rows] == [said[row["video_id"]][0] for row in rows]
    assert list(rows[0]) == ["key", "vid_key", "video_id", "sentence"]
    assert [videos[f"video{i}"].get("twin") for i in range(9, 16)] == [
        None,
        "video9",
        None,
        "video11",
        None,
        "video13",
        None,
    ]
    assert [videos[f"video{i}"]["differs_in"] for i in (10, 12, 14)] == list(scenes.ATTRIBUTES[:3])


def test_files_hold_what_is_drawn_and_said(made):
    data, train, val = synthetic.draw(9, 7, seed=4)
    assert data == json.loads(Path(made.data_path).read_text())
    clips = [*train[:2], *val[:2]]
    drawn = np.stack([synthetic.film(clip) for clip in clips]).astype(int)
    for i, clip in enumerate(clips):
        film = decoded(Path(made.features_path, f"{clip.id}.mp4"))
        assert film.shape == (24, 64, 64, 3)
        errors = np.abs(film - drawn).mean((1, 2, 3, 4))
        assert errors[i] < 10  # H.264 keeps a quarter of the colours
        assert errors[i] < np.delete(errors, i).min() / 3
        said = {s["caption"] for s in data["sentences"] if s["video_id"] == clip.id}
        assert said <= set(clip.scene.captions())


def test_same_settings_give_the_same_bytes_in_one_process_or_two(made, tmp_path):
    again = synthetic.write(tmp_path / "again", train=9, val=7, seed=4, processes=2)
    assert files(Path(again.data_path).parent) == files(Path(made.data_path).parent)
    other = synthetic.write(tmp_path / "other", train=9, val=7, seed=5)
    shared = files(Path(other.features_path)).items() & files(Path(made.features_path)).items()
    assert not shared


def test_a_bar_shows_how_far_it_is(tmp_path, capsys):
    for silent in (True, False):
        synthetic.write(tmp_path / str(silent), train=3, val=2, size=16, frames=4, silent=silent)
        assert ("making videos" in capsys.readouterr().err) != silent


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="MALLOC_PERTURB_ is glibc's")
def test_bytes_do_not_depend_on_what_memory_held_before(tmp_path):
    """glibc fills fresh memory with the complement of MALLOC_PERTURB_."""
    code = "import sys; from retrieval import synthetic; synthetic.write(sys.argv[1], train=9, val=7, seed=4)"
    example = str(Path(synthetic.__file__).parents[1])
    runs = []
    for perturb in ("0", "85", "170"):
        environment = {**os.environ, "MALLOC_PERTURB_": perturb, "PYTHONPATH": example}
        runs.append(subprocess.Popen([sys.executable, "-c", code, str(tmp_path / perturb)], env=environment))
    assert [run.wait() for run in runs] == [0, 0, 0]
    found = [files(tmp_path / perturb) for perturb in ("0", "85", "170")]
    assert found[0] == found[1] == found[2]


def test_what_is_there_is_used_as_it_is(made, monkeypatch):
    before = files(Path(made.data_path).parent)
    monkeypatch.setattr(synthetic, "encode", lambda *_: pytest.fail("made again"))
    assert synthetic.write(Path(made.data_path).parent, train=9, val=7, seed=4) == made
    assert files(Path(made.data_path).parent) == before


def test_an_empty_folder_is_filled(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    paths = synthetic.write(folder, train=1, val=1, size=16, frames=4)
    assert decoded(Path(paths.features_path, "video1.mp4")).shape == (4, 16, 16, 3)
    assert list(tmp_path.iterdir()) == [folder], "something is left over"


@pytest.mark.parametrize(
    ("name", "value"), [("train", 10), ("val", 8), ("seed", 5), ("size", 32), ("frames", 8), ("fps", 4)]
)
def test_other_settings_are_refused(made, name, value):
    with pytest.raises(UsageError, match=f"{name} .*, not {value}: delete it or give another"):
        synthetic.write(Path(made.data_path).parent, **{"train": 9, "val": 7, "seed": 4, name: value})


def test_a_set_of_another_version_is_refused(made, monkeypatch):
    monkeypatch.setattr(synthetic, "VERSION", 99)
    with pytest.raises(UsageError, match="with version 2, not 99"):
        synthetic.write(Path(made.data_path).parent, train=9, val=7, seed=4)


def test_something_else_in_the_folder_is_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path} holds no synthetic videos but something else")):
        synthetic.write(tmp_path, train=1, val=1)
    assert files(tmp_path) == {"thesis.tex": b"x"}
    with pytest.raises(UsageError, match="is a file"):
        synthetic.write(tmp_path / "thesis.tex", train=1, val=1)
    (tmp_path / synthetic.MANIFEST).write_text("{")
    with pytest.raises(UsageError, match=rf"{synthetic.MANIFEST} is no JSON.*; delete"):
        synthetic.write(tmp_path, train=1, val=1)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"no synthetic videos can be written to .*file/deep/set: Not a directory"):
        synthetic.write(tmp_path / "file" / "deep" / "set", train=1, val=1)


def test_a_set_that_was_not_finished_is_none(tmp_path, monkeypatch):
    encode, calls = synthetic.encode, []

    def killed(path, film, fps):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        encode(path, film, fps)

    monkeypatch.setattr(synthetic, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic.write(tmp_path / "set", train=3, val=3, size=16, frames=4)
    assert not list(tmp_path.iterdir())


def test_another_process_that_was_quicker_is_no_error(tmp_path, monkeypatch):
    encode = synthetic.encode
    settings = {"train": 1, "val": 1, "size": 16, "frames": 4}

    def meanwhile(path, film, fps):
        monkeypatch.setattr(synthetic, "encode", encode)
        synthetic.write(tmp_path / "set", **settings)
        encode(path, film, fps)

    monkeypatch.setattr(synthetic, "encode", meanwhile)
    synthetic.write(tmp_path / "set", **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 63}, "size must be even"),
        ({"frames": 3}, "frames must be an int of 4 or more"),
        ({"train": 0}, "train must"),
    ],
)
def test_numbers_that_no_video_has(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        synthetic.write(tmp_path / "set", **{"train": 1, "val": 1, **change})


def test_without_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-image"):
        synthetic.write(tmp_path / "set", train=1, val=1)
    assert not list(tmp_path.iterdir())


def test_a_scikit_image_without_photographs(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("skimage", tmp_path / "skimage" / "__init__.py")
    monkeypatch.setattr(drawing, "find_spec", lambda name: spec)
    with pytest.raises(UsageError, match=r"astronaut.png can't be read: pip install --force-reinstall scikit-image"):
        synthetic.write(tmp_path / "set", train=1, val=1)
