# SPDX-License-Identifier: Apache-2.0
"""Pictures of a merging: exact pixels of small cases, the files, the errors, and the script that draws the README's."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stoptome_kernels as stk
import torch

from support import ROOT

Image = pytest.importorskip("PIL.Image")
PATCH = 4  # pixels a side


def pixels(picture) -> torch.Tensor:
    return torch.from_numpy(np.array(picture))


def video(frames=2, side=2, seed=0) -> torch.Tensor:
    """``(T, 3, H, W)`` uint8 of random pixels."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, side * PATCH, side * PATCH), generator=rng, dtype=torch.uint8)


def patch(frames: torch.Tensor, t: int, index: int) -> torch.Tensor:
    """``(4, 4, 3)``: one patch of frames ``(T, H, W, 3)``."""
    across = frames.shape[2] // PATCH
    y, x = index // across * PATCH, index % across * PATCH
    return frames[t, y : y + PATCH, x : x + PATCH]


def mean(*patches: torch.Tensor) -> torch.Tensor:
    """Rounded half up."""
    return (torch.stack(patches).double().mean((0, 1, 2)) + 0.5).floor().byte()


def drawn(frames, trace, **options) -> torch.Tensor:
    """``(T, H, W, 3)``: the frames cut out of a strip."""
    count = options.pop("count", len(frames))
    picture = pixels(stk.visualize(frames, trace, layout="strip", gap=0, **{"scale": 1} | options))
    return torch.stack(picture.chunk(count, 1))


# token 0 of each frame is the class token; tokens 1 and 2 of frame 0 (its upper patches) became one
PAIR = torch.tensor([[0, 1, 1, 2, 3], [4, 5, 6, 7, 8]])
# patch 0 of frame 0 and patch 3 of frame 1 became one
ACROSS = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 1]])


def test_a_merged_pair_has_its_mean_colour_and_the_rest_stays():
    frames = video()
    before = frames.permute(0, 2, 3, 1)
    after = drawn(frames, PAIR, line=0)
    fill = mean(patch(before, 0, 0), patch(before, 0, 1))
    assert (after[0, :4] == fill).all()
    assert torch.equal(after[0, 4:], before[0, 4:])
    assert torch.equal(after[1], before[1])


def test_outlines_lie_on_the_border_of_groups_only():
    frames = video()
    after, flat = drawn(frames, PAIR, line=1), drawn(frames, PAIR, line=0)
    changed = (after != flat).any(-1)
    border = torch.zeros(2, 8, 8, dtype=torch.bool)
    border[0, :4] = True  # the pair is one area of 4 x 8 pixels …
    border[0, 1:3, 1:7] = False  # … and has no line where its patches meet
    assert torch.equal(changed, border)
    assert len(after[border].unique(dim=0)) == 1


@pytest.mark.parametrize("bright", [False, True])
def test_outlines_differ_from_their_fill(bright):
    frames = torch.full((2, 3, 8, 8), 250 if bright else 5, dtype=torch.uint8)
    after = drawn(frames, PAIR, line=1)
    outline, fill = after[0, 0, 0].int(), after[0, 1, 1].int()
    assert ((outline < fill - 60) if bright else (outline > fill + 60)).all()


def test_corners_of_an_outline_are_closed():
    frames = video(1)
    shape = torch.tensor([[0, 1, 1, 1, 2]])  # an L: its inner corner touches the odd patch with one pixel only
    changed = (drawn(frames, shape, line=1) != drawn(frames, shape, line=0)).any(-1)[0]
    assert changed[3, 3]
    assert not changed[2, 2]
    assert not changed[4:, 4:].any()


def test_a_token_of_several_frames_looks_the_same_in_all_of_them():
    frames = video()
    before = frames.permute(0, 2, 3, 1)
    after = drawn(frames, ACROSS, line=1)
    first, second = patch(after, 0, 0), patch(after, 1, 3)
    assert torch.equal(first, second)
    assert torch.equal(first[1, 1], mean(patch(before, 0, 0), patch(before, 1, 3)))
    assert first[0, 0].max() == 255  # vivid: saturated, and bright
    assert first[0, 0].min() < 128
    assert torch.equal(patch(after, 0, 3), patch(before, 0, 3))
    assert torch.equal(patch(after, 1, 0), patch(before, 1, 0))


def test_tokens_of_several_frames_differ_in_their_outlines():
    dest = torch.arange(17).repeat(2, 1)  # every patch with the same patch of the other frame
    after = drawn(video(2, 4), dest, line=1)
    colours = {tuple(patch(after, 0, index)[0, 0].tolist()) for index in range(16)}
    assert len(colours) == 16


def test_an_outline_within_one_frame_is_not_vivid():
    grey = torch.full((2, 3, 8, 8), 100, dtype=torch.uint8)
    assert len(drawn(grey, PAIR, line=1)[0, 0, 0].unique()) == 1
    assert len(drawn(grey, ACROSS, line=1)[0, 0, 0].unique()) > 1


def test_equal_indices_in_different_items_of_a_plan_are_different_tokens():
    frames, x = video(), torch.randn(2, 5, 8)
    plan = stk.match(x, 1)
    assert torch.equal(drawn(frames, plan), drawn(frames, plan.dest + torch.tensor([[0], [100]])))
    nothing = stk.match(x, 0)  # a trace as a tensor would say that each patch became one with its like
    assert torch.equal(drawn(frames, nothing), frames.permute(0, 2, 3, 1))
    assert not torch.equal(drawn(frames, nothing.dest), frames.permute(0, 2, 3, 1))


def test_composed_plans_and_their_protected_tokens():
    x = torch.randn(2, 3 + 16, 8)
    plan = stk.match(x, 4, protected=3)
    plan = plan.then(stk.match(stk.merge(x, plan)[0], 3, protected=3))
    frames = video(2, 4)
    assert torch.equal(drawn(frames, plan), drawn(frames, plan.dest + torch.tensor([[0], [100]]), protected=3))


def test_a_video_of_several_is_chosen():
    frames, both = video(), torch.stack([PAIR, ACROSS])
    for trace in (both, SimpleNamespace(dest=both.int(), protected=1), SimpleNamespace(dest=both)):
        assert torch.equal(drawn(frames, trace), drawn(frames, PAIR))
        assert torch.equal(drawn(frames, trace, video=1), drawn(frames, ACROSS))
    plan = stk.match(torch.randn(4, 5, 8), 1)  # two videos of two frames
    assert torch.equal(drawn(frames, plan, video=1), drawn(frames, plan.dest[2:] + torch.tensor([[0], [100]])))


def test_the_same_picture_from_all_forms_of_frames():
    frames = video()
    expected = drawn(frames, PAIR)
    last, exact = frames.permute(0, 2, 3, 1), frames.double() / 255
    clip = [torch.tensor(values)[:, None, None] for values in sys.modules["stoptome_kernels.visualize"].CLIP]
    forms = [last, exact, exact.float(), frames.numpy(), last.numpy()[::-1][::-1], exact.requires_grad_()]
    for form in forms:
        assert torch.equal(drawn(form, PAIR), expected)
    assert torch.equal(drawn(((exact - clip[0]) / clip[1]).float(), PAIR, normalized="clip"), expected)
    assert torch.equal(drawn(exact * 4 - 2, PAIR, normalized=([0.5] * 3, [0.25] * 3)), expected)
    assert torch.equal(drawn(frames, PAIR.numpy()), expected)
    frozen = frames.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(drawn(frozen[..., ::-1], PAIR), drawn(frames.flip(-1), PAIR))


def test_patches_need_be_neither_square_nor_in_a_square():
    frames = torch.randint(0, 256, (1, 3, 4, 24), dtype=torch.uint8)
    dest = torch.arange(7)[None].clone()
    dest[0, 2] = 1
    filled = (drawn(frames, dest, line=0)[0] != frames[0].permute(1, 2, 0)).any(-1)
    assert filled[:, :8].float().mean() > 0.9  # six patches of 4 x 4: the first two
    assert not filled[:, 8:].any()
    filled = (drawn(frames, dest, grid=(2, 3), line=0)[0] != frames[0].permute(1, 2, 0)).any(-1)
    assert filled[:2, :16].float().mean() > 0.9  # of 2 x 8
    assert not filled[2:].any()
    assert not filled[:, 16:].any()


def test_shown_frames_have_the_colours_of_all_frames():
    frames = video()
    assert torch.equal(drawn(frames, ACROSS, show=[1], count=1)[0], drawn(frames, ACROSS)[1])
    assert torch.equal(drawn(frames, ACROSS, show=[1, 0]), drawn(frames, ACROSS).flip(0))


def test_scale_repeats_pixels_but_not_outlines():
    frames = video()
    big, small = drawn(frames, PAIR, scale=3, line=0), drawn(frames, PAIR, line=0)
    assert torch.equal(big, small.repeat_interleave(3, 1).repeat_interleave(3, 2))
    line = (drawn(frames, PAIR, scale=3, line=1) != big).any(-1)
    assert line.sum() == 2 * 24 + 2 * 10  # once around 12 x 24 pixels
    assert stk.visualize(frames, PAIR, layout="strip").height >= 112


def test_layouts():
    frames = video(7)
    dest = torch.arange(7 * 5).view(7, 5)
    cells = frames.permute(0, 2, 3, 1)
    grid = pixels(stk.visualize(frames, dest, scale=1, gap=2))
    assert grid.shape == (3 * 8 + 2 * 2, 3 * 8 + 2 * 2, 3)
    assert torch.equal(grid[10:18, 20:28], cells[5])
    assert torch.equal(grid[20:28, :8], cells[6])
    assert (grid[20:, 8:] == 255).all()
    assert (grid[8:10] == 255).all()
    both = pixels(stk.visualize(frames, dest, scale=1, gap=2, layout="strip", beside=True))
    assert both.shape == (2 * 8 + 2, 7 * 8 + 6 * 2, 3)
    assert torch.equal(both[:8], both[10:])
    rows = stk.visualize(frames, dest, scale=1, gap=2, beside=True)
    assert rows.size == (4 * 8 + 3 * 2, 2 * 18 + 6)  # pairs stand further apart than the two of a pair
    merged = pixels(stk.visualize(video(), PAIR, scale=1, gap=2, layout="strip", beside=True))
    assert torch.equal(merged[:8, :8], video().permute(0, 2, 3, 1)[0])
    assert torch.equal(merged[10:, :8], drawn(video(), PAIR)[0])


@pytest.mark.alone
def test_a_picture_of_a_real_video_takes_no_time():
    from time import perf_counter

    frames = torch.rand(12, 3, 224, 224)
    dest = torch.randint(0, 1200, (12, 197))
    start = perf_counter()
    stk.visualize(frames, dest)
    assert perf_counter() - start < 5  # 0.1 s where nothing else runs


# files


def test_still_files_hold_the_picture(tmp_path):
    for name in ("a.png", "a.jpg", "a.JPEG"):
        picture = stk.visualize(video(), PAIR, tmp_path / name)
        with Image.open(tmp_path / name) as file:
            assert file.size == picture.size
            assert file.mode == "RGB"
            if name == "a.png":
                assert torch.equal(pixels(file), pixels(picture))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.JPEG", "a.jpg", "a.png"]
    stk.visualize(video(), PAIR, str(tmp_path / "b.png"))


@pytest.mark.parametrize("beside", [False, True])
def test_a_gif_plays_all_frames(tmp_path, beside):
    frames = torch.zeros(5, 3, 8, 8, dtype=torch.uint8) + torch.arange(5, dtype=torch.uint8)[:, None, None, None] * 50
    dest = torch.arange(25).view(5, 5)
    picture = stk.visualize(frames, dest, tmp_path / "a.gif", scale=1, fps=10, beside=beside, gap=2)
    assert picture.height > 8  # what is returned is the sheet
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 5
        assert file.size == ((18, 8) if beside else (8, 8))
        for t in range(5):
            file.seek(t)
            assert file.info["duration"] == 100
            assert file.info["loop"] == 0
            assert pixels(file.convert("RGB"))[0, 0].tolist() == [50 * t] * 3


def without(monkeypatch, *names):
    """Importing these modules fails."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def test_mp4_without_an_encoder_says_what_to_install(tmp_path, monkeypatch):
    without(monkeypatch, "av", "imageio_ffmpeg")
    with pytest.raises(ImportError, match=r"pip install av \(or imageio-ffmpeg\)"):
        stk.visualize(video(), PAIR, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_mp4_frames_reach_the_encoder_whole(tmp_path, monkeypatch):
    sent = []

    def write_frames(path, size, fps, **_):
        assert size == (10, 10)
        assert fps == 8
        try:
            while True:
                sent.append((yield))
        finally:
            Path(path).write_bytes(b"film")

    without(monkeypatch, "av")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(write_frames=write_frames))
    frames = torch.randint(0, 256, (3, 3, 9, 9), dtype=torch.uint8)  # odd: H.264 wants even sides
    stk.visualize(frames, torch.arange(30).view(3, 10), tmp_path / "a.mp4", fps=8, scale=1)
    assert (tmp_path / "a.mp4").read_bytes() == b"film"
    assert len(sent) == 3
    for frame, given in zip(sent, frames.permute(0, 2, 3, 1), strict=True):
        picture = torch.frombuffer(bytearray(frame), dtype=torch.uint8).view(10, 10, 3)
        assert torch.equal(picture[:9, :9], given)


@pytest.mark.parametrize("encoder", ["av", "imageio_ffmpeg"])
def test_mp4_files(tmp_path, monkeypatch, encoder):
    pytest.importorskip(encoder)
    without(monkeypatch, *{"av", "imageio_ffmpeg"} - {encoder})
    stk.visualize(video(side=5), torch.arange(52).view(2, 26), tmp_path / "a.mp4")
    assert b"ftyp" in (tmp_path / "a.mp4").read_bytes()[:12]
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif"])
def test_an_error_while_writing_leaves_what_was_there(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes(b"before")
    save = Image.Image.save

    def full_disk(self, path, *args, **options):
        save(self, path, *args, **options)
        raise OSError("no space left")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        stk.visualize(video(), PAIR, file)
    assert file.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# errors


@pytest.mark.parametrize(
    ("frames", "trace", "options", "error", "says"),
    [
        (video().tolist(), PAIR, {}, TypeError, r"^frames must be a torch tensor or numpy array.*got list"),
        (video()[0], PAIR, {}, ValueError, r"^frames must be .*\(T, 3, H, W\).*got shape \(3, 8, 8\)$"),
        (video()[None], PAIR, {}, ValueError, r"^frames must be .*choose one video: frames\[b\]"),
        (video()[:, :2], PAIR, {}, ValueError, r"^frames must be .*got shape \(2, 2, 8, 8\)"),
        (video()[:0], PAIR, {}, ValueError, r"^frames must be .*got shape \(0, 3, 8, 8\)"),
        (video().int(), PAIR, {}, TypeError, r"^frames must be uint8 or floating in \[0, 1\], got torch.int32"),
        (np.empty((2, 3, 8, 8), object), PAIR, {}, TypeError, r"^frames must be .*got an array of object"),
        (
            video() / 100,
            PAIR,
            {},
            ValueError,
            r"^frames must be in \[0, 1\].*undo the normalisation.*normalized=\"clip\"",
        ),
        (video() * torch.nan, PAIR, {}, ValueError, r"^frames must be in \[0, 1\], but they range from nan"),
        (video().float(), PAIR, {"normalized": "clip"}, ValueError, r"^frames .*after undoing normalized.*pass uint8"),
        (video(), PAIR, {"normalized": "clip"}, ValueError, r"^normalized is given, but frames are uint8"),
        (video() / 255, PAIR, {"normalized": "imagenet"}, ValueError, r"^normalized must be \"clip\" or \(mean, std\)"),
        (
            video() / 255,
            PAIR,
            {"normalized": (0.5, 0.25)},
            ValueError,
            r"^normalized must be \"clip\" or \(mean, std\)",
        ),
        (video() / 255, PAIR, {"normalized": ([0.5] * 3, [0] * 3)}, ValueError, r"^normalized must be"),
        (video(), "plan", {}, TypeError, r"^trace must be a MergePlan, an integer tensor.*got str"),
        (video(), SimpleNamespace(dest=None), {}, TypeError, r"^trace must be .*got NoneType"),
        (video(), PAIR.float(), {}, TypeError, r"^trace must be .*got torch.float32 of shape \(2, 5\)"),
        (video(), PAIR > 1, {}, TypeError, r"^trace must be .*got torch.bool"),
        (video(), PAIR[0], {}, TypeError, r"^trace must be .*of shape \(5,\)"),
        (video(), PAIR[:1], {}, ValueError, r"^trace has 1 frames of 5 tokens, but frames has T = 2"),
        (video(3), PAIR, {}, ValueError, r"^trace has 2 frames of 5 tokens, but frames has T = 3 .*show="),
        (video(2), stk.match(torch.randn(1, 10, 4), 1), {}, ValueError, r"^trace is a plan of N = 1 items.*compose"),
        (video(), PAIR, {"video": 1}, ValueError, r"^video must be less than .*, 1, got 1"),
        (video(), PAIR, {"video": -1}, ValueError, r"^video must be 0 or more"),
        (video(), PAIR, {"protected": 2}, ValueError, r"5 tokens a frame, of which protected = 2 .*leaves 3.*grid="),
        (video(), PAIR, {"protected": 5}, ValueError, r"^trace has 5 tokens.*protected must be less than the tokens"),
        (video(), PAIR, {"protected": "1"}, TypeError, r"^protected must be an int"),
        (video(), PAIR, {"grid": (3, 2)}, ValueError, r"leaves 4, but grid = \(3, 2\) has 6"),
        (video()[..., :6, :], PAIR, {"grid": (4, 1)}, ValueError, r"^grid = \(4, 1\) doesn't divide frames of 6 x 8"),
        (video(), PAIR, {"grid": 2}, TypeError, r"^grid must be a pair"),
        (video()[..., :7], PAIR, {}, ValueError, r"but 4 square patches don't tile frames of 8 x 7"),
        (video(), PAIR, {"show": [2]}, ValueError, r"^show must be a non-empty list .*indices from 0 to 1, got \[2\]"),
        (video(), PAIR, {"show": []}, ValueError, r"^show must be a non-empty list of frame indices"),
        (video(), PAIR, {"layout": "row"}, ValueError, r"^layout must be one of 'grid', 'strip', got 'row'"),
        (video(), PAIR, {"scale": 0}, ValueError, r"^scale must be 1 or more"),
        (video(), PAIR, {"scale": 1.5}, TypeError, r"^scale must be an int"),
        (video(), PAIR, {"gap": -1}, ValueError, r"^gap must be 0 or more"),
        (video(), PAIR, {"line": -1}, ValueError, r"^line must be 0 or more"),
        (video(), PAIR, {"fps": 0}, ValueError, r"^fps must be a positive number"),
        (video(), PAIR, {"out": "a.webm"}, ValueError, r"^out must end in .png, .jpg, .jpeg, .gif, .mp4, got 'a.webm'"),
        (video(), PAIR, {"out": "nowhere/a.png"}, FileNotFoundError, r"^out: there is no folder 'nowhere'"),
    ],
)
def test_errors_name_the_argument_and_the_way_out(tmp_path, monkeypatch, frames, trace, options, error, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        stk.visualize(frames, trace, **options)
    assert not list(tmp_path.iterdir())


def test_without_pillow_it_says_what_to_install(monkeypatch):
    without(monkeypatch, "PIL", "PIL.Image")
    with pytest.raises(ImportError, match="pip install pillow"):
        stk.visualize(video(), PAIR)


@pytest.mark.slow
def test_importing_the_package_imports_no_pillow_and_drawing_needs_no_numpy(tmp_path):
    code = """
import sys, warnings
warnings.simplefilter("ignore")  # torch mentions that numpy is missing
sys.modules["numpy"] = None
import torch, stoptome_kernels as stk
assert "PIL" not in sys.modules
dest = torch.arange(10).view(2, 5) // 2
stk.visualize(torch.rand(2, 3, 8, 8), dest, sys.argv[1])
assert "PIL" in sys.modules
"""
    for name in ("a.png", "a.gif"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name).stat().st_size > 0


# bench/visualize.py


@pytest.fixture
def script():
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    import visualize

    return visualize


@pytest.mark.slow
def test_the_script_draws(tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, ROOT / "bench" / "visualize.py", "--frames", 4, "--patch", 56, "--r", 3, "--layers", 2]
    command += ["--clip", 2, "--show", 3, "--small", "--out", "a.png", "a.gif"]
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=120, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "4 frames, 68 tokens → 44 (65%)"
    assert "a.png: 2 frames" in done.stdout  # a group of joined frames
    assert "a.gif: 4 frames" in done.stdout
    with Image.open(tmp_path / "a.png") as file:
        assert file.size == (2 * 224 + 4, 2 * 224 + 4)
        assert file.mode == "P"  # --small
    with Image.open(tmp_path / "a.gif") as file:
        assert file.n_frames == 4


def test_the_script_follows_tokens_through_layers_and_joined_frames(script):
    x = torch.randn(4, 1 + 16, 6)
    dest, left = script.merge_video(x, 3, 3, 1)
    assert left == 4 * (17 - 9)
    assert len(dest.unique()) == left
    x[2:, 1:] = x[:2, 1:]  # frames 2 and 3 are copies of 0 and 1
    dest, left = script.merge_video(x, 4, 2, 4)
    assert left == 4 * (17 - 8)
    assert dest.shape == (4, 17)
    assert len(dest.unique()) == left
    assert len(dest[:, 0].unique()) == 4  # class tokens stay apart
    assert not set(dest[:, 0].tolist()) & set(dest[:, 1:].flatten().tolist())
    assert set(dest[:2, 1:].flatten().tolist()) & set(dest[2:, 1:].flatten().tolist())


def test_joining_puts_protected_tokens_first_and_frames_in_order(script):
    x = torch.arange(4 * 5).view(4, 5, 1).float()
    joined, size, place = script.join(x, x[..., 0], 2, 2)
    assert joined[0, :, 0].tolist() == [0, 1, 5, 6, 2, 3, 4, 7, 8, 9]
    assert torch.equal(size, joined[..., 0])
    assert torch.equal(joined[1].squeeze(-1)[place], x[2:, :, 0])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--patch", "33"], "must divide 224, got 33: choose from 4, 7, 8, 14, 16"),
        (["--clip", "5"], "must divide --frames = 12, got 5"),
        (["--r", "-1"], "must be an integer, 0 or more, got '-1'"),
        (["--frames", "0"], "must be a positive int"),
    ],
)
def test_bad_arguments_of_the_script(script, capsys, args, says):
    with pytest.raises(SystemExit) as stopped:
        script.arguments(args)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_the_script_reports_errors_in_a_line(script, capsys, tmp_path):
    assert script.main(["--frames", "1", "--patch", "112", "--r", "1", "--out", str(tmp_path / "a.bmp")]) == 2
    assert "error: out must end in .png" in capsys.readouterr().err
