# SPDX-License-Identifier: Apache-2.0
"""Sweeps over r: what is run, measured and compared, what is chosen, and how it is shown."""

import json
import sys

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels import sweeps

from harness import libraries  # noqa: F401  (first of all that may import torchvision)
from support.sweep import CLIPS, TOKENS, encoder, stop_model, video


@pytest.fixture
def timed(monkeypatch):
    """Give the settings these samples in place of measured ones."""

    def install(**samples):
        named = {name.removeprefix("r"): values for name, values in samples.items()}

        def measured(calls, seconds, **options):
            for name in calls:
                options["before"](name)
                calls[name]()
            return {name: named[name] for name in calls}

        monkeypatch.setattr(sweeps, "measure_alternately", measured)

    return install


# rows


def test_numbers_of_the_rows(timed):
    """Medians, quartiles, speed-up over unpatched, η by the ideal of the blocks, tokens, cosines."""
    timed(r0=[4.0, 2.0, 3.0, 9.0, 1.0], r2=[2.0, 1.0, 1.5, 9.0, 0.5], r6=[1.0, 1.0, 1.0, 1.0, 6.0])
    model = encoder()
    found = stk.sweep(model, TOKENS, (2, 6), protected=0)
    plain, two, six = found.rows
    assert [row.r for row in found.rows] == ["0", "2", "6"]
    assert found.rounds == 5
    assert [row.seconds for row in found.rows] == [3.0, 1.5, 1.0]
    assert two.quartiles == (1.0, 2.0)
    assert [row.speedup for row in found.rows] == [1.0, 2.0, 3.0]
    assert (plain.cosine, plain.worst, plain.loss) == (pytest.approx(1, abs=1e-12), pytest.approx(1, abs=1e-12), 0)
    want = model.eval()(TOKENS)
    for row, r in ((two, 2), (six, 6)):
        got = stk.apply_tome_patch(model, r, protected=0)(TOKENS)
        cosines = torch.cosine_similarity(got.flatten(1), want.flatten(1))
        assert row.cosine == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert row.worst == pytest.approx(cosines.min().item(), abs=1e-6)
        assert row.worst < row.cosine < 1
        assert row.loss == 1 - row.cosine
        assert row.config == stk.ToMeConfig(r)
    assert plain.score is plain.peak_bytes is None


def test_ideal_is_that_of_the_schedule(timed):
    timed(r0=[2.0] * 3, r2=[1.0] * 3, **{"r[4] * 3": [0.5] * 3})
    found = stk.sweep(stop_model(), call=lambda model: model.encode_video(video()), r=[2, [4, 4, 4]])
    schedule = stk.ToMeConfig(2).schedule(3, 19, 4, 3, 64)
    row = found.rows[1]
    assert (row.ideal, row.eta) == (schedule.speedup, 2 / schedule.speedup)
    assert [(row.items, row.tokens) for row in found.rows] == [(4, 19), (4, 13), (4, 7)]
    assert found.rows[0].ideal == found.rows[0].eta == 1


def test_table(timed):
    timed(r0=[0.002] * 3, r2=[0.001] * 3, **{f"r{sweeps._name(CLIPS)}": [0.0015] * 3})
    model = stop_model()
    scores = iter((0.5, 0.48, 0.25))
    found = stk.sweep(
        model, call=lambda model: model.encode_video(video()), r=(2, CLIPS), evaluate=lambda _: next(scores)
    )
    head, names, plain, two, clips = str(found).splitlines()
    assert head == "StopModel, 3 rounds"
    assert names.split() == ["r", "ms", "quartiles", "speed-up", "ideal", "η", "items", "×", "tokens", "score", "loss"]
    assert plain.split() == ["0", "2", "2", "to", "2", "1.00×", "1.00×", "1.00", "4", "×", "19", "0.5", "0"]
    assert two.split()[:6] == ["2", "1", "1", "to", "1", "2.00×"]
    assert two.split()[-5:] == ["4", "×", "13", "0.48", "0.02"]
    assert "2 × " in clips
    assert "merge_layers=(1,)" in clips


def test_columns_that_are_empty_are_left_out(timed):
    """An encoder learns the number of tokens when it runs."""
    timed(r0=[1.0] * 3, r2=[1.0] * 3)
    found = stk.sweep(encoder(), TOKENS, [2])
    assert found.rows[1].ideal is found.rows[1].eta is found.rows[1].tokens is None
    assert str(found).splitlines()[1].split() == ["r", "ms", "quartiles", "speed-up", "cosine", "worst"]


def test_peak_memory_on_a_gpu(monkeypatch):
    """Of each setting; the device is waited for, before and after each call."""
    waited = []
    monkeypatch.setattr(sweeps, "_cuda_devices", lambda model: ["cuda:1"])
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)

    def peak(call, devices):
        call()
        assert devices == ["cuda:1"]
        return 3 * 2**20 if stk.is_patched(model) else 4 * 2**20

    monkeypatch.setattr(sweeps, "peak_cuda_bytes", peak)
    model = encoder()
    found = stk.sweep(model, TOKENS, 2, seconds=0)
    assert [row.peak_bytes for row in found.rows] == [4 * 2**20, 3 * 2**20]
    assert waited == ["cuda:1"] * 24
    assert str(found).splitlines()[1].split()[-4:] == ["peak", "MiB", "cosine", "worst"]
    assert str(found).splitlines()[3].split()[-3] == "3.0"


def test_rows_become_json(timed):
    timed(r0=[1.0] * 3, r2=[0.5] * 3)
    plain, two = json.loads(json.dumps(stk.sweep(encoder(), TOKENS, 2).as_dicts()))
    assert (plain["r"], two["r"], two["speedup"], two["config"]["tome_r"]) == ("0", "2", 2.0, 2)


def test_it_measures():
    """With a real clock."""
    found = stk.sweep(encoder(), TOKENS, (0, 2, 4), seconds=0)
    assert [row.r for row in found.rows] == ["0", "2", "4"]
    assert found.rounds == 5
    assert all(row.seconds > 0 and row.quartiles[0] <= row.seconds <= row.quartiles[1] for row in found.rows)


# what is run


@pytest.mark.parametrize(
    "how",
    [
        {"inputs": TOKENS},
        {"inputs": (TOKENS,)},
        {"inputs": {"src": TOKENS}},
        {"call": lambda model: model(TOKENS)},
        {"call": lambda model: {"loss": torch.tensor(1.0), "rows": [model(TOKENS)]}},
    ],
)
def test_inputs(how):
    want = stk.sweep(encoder(), TOKENS, 4, seconds=0).rows[1].cosine
    assert stk.sweep(encoder(), r=4, seconds=0, **how).rows[1].cosine == want < 0.999


def test_it_runs_in_eval_mode_without_gradients_patched_as_said():
    seen = []

    def look(model):
        described = stk.describe(model)
        seen.append((described.config and described.config.tome_r, model.training, torch.is_grad_enabled()))
        return len(seen)

    model = stk.apply_tome_patch(encoder().train(), 7)
    found = stk.sweep(model, TOKENS, (3, (4, 0.5), "training", [1, 0, 2]), evaluate=look, seconds=0)
    assert seen == [(None, False, False), (3, False, False), ((4, 0.5), False, False), (2, False, False),
                    ((1, 0, 2), False, False)]  # fmt: skip
    assert [row.score for row in found.rows] == [1, 2, 3, 4, 5]
    assert [row.loss for row in found.rows] == [0, -1, -2, -3, -4]
    assert [row.r for row in found.rows] == ["0", "3", "(4, 0.5)", "training", "[1, 0, 2]"]
    assert all(row.cosine is row.worst is None for row in found.rows)
    assert model.training
    assert torch.is_grad_enabled()


def test_the_given_patch_is_not_the_baseline():
    """Nor do its settings count."""
    model = stk.apply_tome_patch(encoder().eval(), 9, prop_attn=False, protected=4)
    want = model(TOKENS)
    found = stk.sweep(model, TOKENS, 4, seconds=0)
    assert found.rows[1].cosine == stk.sweep(encoder(), TOKENS, 4, seconds=0).rows[1].cosine
    assert found.rows[1].config == stk.ToMeConfig(4)
    assert torch.equal(model(TOKENS), want)


def test_each_setting_starts_from_the_given_model():
    """A merge layer's trained embeddings count, though a setting without them stands before."""
    model = stk.apply_tome_patch(stop_model(), config=CLIPS).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tome_frame_embedding" in name:
                parameter.normal_()
        got = model.encode_video(video())
    found = stk.sweep(model, call=lambda model: model.encode_video(video()), r=(2, CLIPS), seconds=0)
    want = stk.remove_tome_patch(model).encode_video(video())
    assert found.rows[2].cosine == pytest.approx(
        torch.cosine_similarity(got.flatten(1), want.flatten(1)).mean().item(), abs=1e-6
    )


def test_calls_are_timed_with_their_setting():
    """By turns, after a first run of each; what merges nothing is the unpatched model and no row of its own."""
    seen = []

    def call(model):
        described = stk.describe(model)
        seen.append(described.config.tome_r if described.config else None)
        return model(TOKENS)

    found = stk.sweep(encoder(), call=call, r=([0] * 3, 2, 4), seconds=0)
    assert [row.r for row in found.rows] == ["0", "2", "4"]
    once, turned = [None, 2, 4], [2, 4, None]
    assert seen == [*once, *once, *once, *turned, *[4, None, 2], *once, *turned]


def test_other_settings_go_to_the_patch():
    rows = [stk.sweep(encoder(), TOKENS, 6, seconds=0, prop_attn=on).rows[1] for on in (True, False)]
    assert rows[0].cosine != rows[1].cosine
    assert not rows[1].config.prop_attn


def test_pooled_outputs_come_first():
    """Of what a library gives: hidden states are before them."""

    def call(model):
        rows = model(TOKENS)
        return {"last_hidden_state": rows, "pooler_output": rows[:, 0]}

    want = stk.sweep(encoder(), call=lambda model: model(TOKENS)[:, 0], r=6, seconds=0).rows[1].cosine
    assert stk.sweep(encoder(), call=call, r=6, seconds=0).rows[1].cosine == want


# chosen


def sweep_of(timed, seconds: dict, scores: dict) -> stk.Sweep:
    timed(**{f"r{r}": [value] * 3 for r, value in seconds.items()})
    given = iter(scores.values())
    return stk.sweep(encoder(), TOKENS, list(seconds)[1:], evaluate=lambda _: next(given), seconds=0)


def test_the_fastest_that_loses_little_is_recommended(timed):
    found = sweep_of(timed, {0: 10.0, 2: 8.0, 4: 5.0, 6: 4.0}, {0: 0.8, 2: 0.81, 4: 0.79, 6: 0.6})
    chosen = found.recommend(0.01)  # which 0.8 − 0.79 exceeds by rounding
    assert chosen.row is found.rows[2]
    assert str(chosen) == "r = 4: 2.00× as fast, loses 0.01 of at most 0.01; r = 6 is 2.50× as fast and loses 0.2"
    assert found.recommend(0.009).row.r == "2"
    assert found.recommend(0).row.r == "2"
    assert str(found.recommend(1)) == "r = 6: 2.50× as fast, loses 0.2 of at most 1"


def test_what_is_not_faster_is_not_recommended(timed):
    found = sweep_of(timed, {0: 10.0, 2: 10.0, 4: 11.0, 6: 4.0}, {0: 0.8, 2: 0.9, 4: 0.9, 6: 0.6})
    chosen = found.recommend(0.1)
    assert chosen.row is found.rows[0]
    assert str(chosen) == "r = 0: no setting that loses at most 0.1 is faster; r = 6 is 2.50× as fast and loses 0.2"


@pytest.mark.parametrize(("most", "error"), [(-0.1, ValueError), (float("nan"), ValueError), ("1", TypeError)])
def test_limits_that_are_refused(timed, most, error):
    found = sweep_of(timed, {0: 1.0, 2: 1.0}, {0: 1.0, 2: 1.0})
    with pytest.raises(error, match="max_loss must be"):
        found.recommend(most)


# shown


@pytest.mark.slow  # matplotlib's import
@pytest.mark.parametrize("scored", [True, False])
def test_plot(tmp_path, timed, scored):
    figures = pytest.importorskip("matplotlib.figure")
    timed(r0=[2.0] * 3, r2=[1.0] * 3)
    found = stk.sweep(encoder(), TOKENS, 2, (lambda model: 1 - stk.is_patched(model) / 4) if scored else None)
    axes = found.plot(tmp_path / "sweep.svg")
    assert b"<svg" in (tmp_path / "sweep.svg").read_bytes()
    up = [1.0, 0.75] if scored else [row.cosine for row in found.rows]
    assert axes.lines[0].get_xydata().tolist() == [[1.0, up[0]], [2.0, up[1]]]
    assert axes.get_ylabel() == ("score" if scored else "cosine to the unpatched outputs")
    own = figures.Figure().add_subplot()
    assert found.plot(own) is own
    assert [text.get_text() for text in own.texts] == ["r = 0", "r = 2"]


def test_plot_without_matplotlib(timed, monkeypatch):
    timed(r0=[2.0] * 3, r2=[1.0] * 3)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        stk.sweep(encoder(), TOKENS, 2).plot("sweep.png")


def test_progress(capsys, monkeypatch):
    pytest.importorskip("tqdm")
    stk.sweep(encoder(), TOKENS, 2, seconds=0)
    assert capsys.readouterr().err == ""
    stk.sweep(encoder(), TOKENS, 2, evaluate=lambda _: 0, seconds=0, progress=True)
    assert " 5/6 " in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    stk.sweep(encoder(), TOKENS, 2, seconds=0)
    assert " 0/4 " in capsys.readouterr().err
    stk.sweep(encoder(), TOKENS, 2, seconds=0, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stk.sweep(encoder(), TOKENS, 2, seconds=0)
    with pytest.raises(ImportError, match="pip install tqdm"):
        stk.sweep(encoder(), TOKENS, 2, progress=True)


# a library's model


def test_timm():
    """Features of merged tokens change their shape, and can't be compared."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    found = stk.sweep(model, images, (2, 4), seconds=0)
    assert [row.tokens for row in found.rows] == [17, 11, 5]
    assert found.rows[2].ideal == stk.ToMeConfig(4).schedule(3, 17, width=32).speedup
    assert not stk.is_patched(model)
    assert found.rows[2].cosine < found.rows[0].cosine == pytest.approx(1)
    with pytest.raises(ValueError, match="they change their shape: give evaluate=…"):
        stk.sweep(model, call=lambda model: model.forward_features(images), r=2, seconds=0)
    rows = stk.sweep(model, call=lambda model: model.forward_features(images), r=2, seconds=0, unmerge=True).rows
    assert 0 < rows[1].cosine < 1
