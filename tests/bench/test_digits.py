# SPDX-License-Identifier: Apache-2.0
"""bench/digits.py: that each case is the run that its row names, what is kept of it, and the tables made of rows."""

import copy
import dataclasses
import json
import pickle

import pytest
import stoptome_kernels as stk
import torch

import digits
from charts import digits as page
from harness import datasets, libraries, measure  # noqa: F401  (libraries before timm)

pytest.importorskip("timm")
EACH = 6  # pictures of each digit in the data
SMALL = digits.Recipe(train=2, test=3, base=1, tune=1)
FIRST = digits.Case(25, "inference", "merge")


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Return pictures of ten kinds, each with a bar somewhere else, no two alike."""
    labels = torch.arange(10).repeat_interleave(EACH)
    pixels = torch.randint(0, 60, (10 * EACH, 28, 28), generator=torch.Generator().manual_seed(0))
    for picture, label in zip(pixels, labels, strict=True):
        picture[4 + 2 * label : 6 + 2 * label, 8:20] += 180
    return pixels.to(torch.uint8), labels


@pytest.fixture(autouse=True)
def small(monkeypatch, machine):
    """A narrow model and few pictures, which need no package."""
    monkeypatch.setattr(datasets, "digits", pictures)
    monkeypatch.setitem(digits.MODEL, "embed_dim", 16)
    monkeypatch.setitem(digits.RECIPES, "quick", SMALL)
    monkeypatch.setattr(digits, "BATCH", 10 * SMALL.test)


@pytest.fixture
def study(tmp_path):
    return digits.Study(tmp_path, SMALL, 3)


def run(folder, *more) -> int:
    argv = ["--quick", "--work", folder / "work", "--json", folder / "rows.json", "--seconds", 0.01, *more]
    return digits.main([str(part) for part in argv])


@pytest.mark.slow  # 24 cases of one step each
def test_a_row_for_each_case(tmp_path, monkeypatch, capsys):
    """Of two seeds, by functions that can go to other processes."""
    monkeypatch.setattr(
        digits.side_by_side, "call", lambda functions, at_once: [pickle.loads(pickle.dumps(f))() for f in functions]
    )
    assert run(tmp_path, "--seeds", 2, "--processes", 2) == 0
    said = capsys.readouterr().out
    rows = {(row["r"], row["direction"], row["impl"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert list(rows) == [(case.r, case.when, case.by) for case in digits.cases((0, 25))]
    assert len(rows) == 2 * (1 + 5)
    for (r, when, by), row in rows.items():
        assert (row["shape"], row["op"], row["n"], row["seeds"]) == (f"r={r}", "digits", 30, [0, 1])
        assert all(row[key] for key in ("device", "torch", "date", "threads", "commit"))
        assert row["tokens"] == ([172, 147, 122, 97] if r else [197] * 4)
        control, merged = rows[0, when, "merge"], rows[r, when, "merge"]
        lost = [a - b for a, b in zip(control["accuracy"], row["accuracy"], strict=True)]
        assert row["lost"] == pytest.approx(lost)
        assert row["lost_mean"] == pytest.approx(sum(lost) / 2)
        assert row["lost_interval"][0] <= row["lost_mean"] <= row["lost_interval"][1]
        apart = sum(row["over_merging_interval"]) / 2
        assert apart == pytest.approx(row["lost_mean"] - merged["lost_mean"], abs=1e-9)
        assert ("speedup" in row) == (when == "inference" and by == "merge"), "no time that was not measured"
        if r == 0:
            assert set(row["lost"]) == {0}
            assert row["same_digit"] == [100, 100]
        answers = json.loads((tmp_path / f"work/quick/1/{digits.Case(r, when, by).name}.json").read_text())["value"]
        assert row["accuracy"][1] == answers["accuracy"]
        assert set(answers["predicted"]) <= set("0123456789")
    merged = rows[25, "inference", "merge"]
    assert merged["eta"] == pytest.approx(merged["speedup"] / merged["speedup_ideal"], abs=1e-3)
    assert page.table([*rows.values()]) in said


@pytest.mark.parametrize("when", digits.WHEN)
@pytest.mark.parametrize("by", digits.BY)
def test_a_case_runs_as_its_row_says(study, monkeypatch, when, by):
    """The tokens that arrive at the last norm, in training and evaluation; the settings; who chose them."""
    seen, chosen, models = set(), [], []
    patch, method = digits.patch, digits.BY[by]

    def patched(model, config):
        model.norm.register_forward_hook(lambda norm, given, result: seen.add((norm.training, result.shape[1])))
        models.append(patch(model, config))
        return models[0]

    def spied(seed):
        choose = method(seed)
        return None if choose is None else lambda *given: chosen.append((seed, given[1])) or choose(*given)

    study.base()
    monkeypatch.setattr(digits, "patch", patched)
    monkeypatch.setitem(digits.BY, by, spied)
    study.result(digits.Case(49, when, by))
    assert seen == ({(True, 26), (False, 26)} if when == "training" else {(False, 26)})
    assert stk.describe(models[0]).config.prop_attn == (by != "merge, sizes off")
    forwards = 2 if when == "training" else 1  # of four layers; the last has 49 tokens to merge 24 of
    assert chosen == ([] if by.startswith("merge") else [(3, 49), (3, 49), (3, 49), (3, 24)] * forwards)


def test_the_methods_of_the_study_are_these():
    """Those of a name are of that kind; a seed draws its own."""
    assert digits.BY["merge"](0) is digits.BY["merge, sizes off"](0) is None
    keys = torch.zeros(2, 2, 9, 4)
    for by, weightless in (("random pairs", False), ("drop", True), ("pool", False)):
        plans = [digits.BY[by](seed)(keys, 3, 1) for seed in (0, 0, 1)]
        assert bool((plans[0].members < 0).any()) == weightless
        assert torch.equal(plans[0].dest, plans[1].dest)
        assert torch.equal(plans[0].dest, plans[2].dest) == (by == "pool")


def counted(monkeypatch) -> list[str]:
    """Return a list to which every training from now on adds itself."""
    calls, train = [], digits.train
    monkeypatch.setattr(digits, "train", lambda *given: calls.append(given) or train(*given))
    return calls


def test_what_is_there_is_not_computed_again(study, tmp_path, monkeypatch):
    first = study.result(FIRST)
    calls = counted(monkeypatch)
    monkeypatch.setattr(digits, "predict", lambda *_: pytest.fail("asked again"))
    again = digits.Study(tmp_path, SMALL, 3)
    assert again.result(FIRST) == first
    assert torch.equal(again.base().pos_embed, study.base().pos_embed)
    assert not calls


@pytest.mark.parametrize("change", ["epochs", "learning rate", "model", "window", "damaged"])
def test_what_another_recipe_made_does_not_count(study, tmp_path, monkeypatch, change):
    study.result(FIRST)
    calls = counted(monkeypatch)
    recipe = SMALL
    if change == "epochs":
        recipe = dataclasses.replace(SMALL, base=2)
    elif change == "learning rate":
        monkeypatch.setitem(digits.TRAINING, "base_lr", 1e-3)
    elif change == "model":
        monkeypatch.setitem(digits.MODEL, "mlp_ratio", 1.0)
    elif change == "window":
        monkeypatch.setattr(digits, "WINDOW", 4)
    else:
        for file in (tmp_path / "3").iterdir():
            file.write_bytes(file.read_bytes()[:-9])
    digits.Study(tmp_path, recipe, 3).result(FIRST)
    assert len(calls) == 1


def test_results_of_seeds_are_kept_apart(study, tmp_path, monkeypatch):
    study.result(FIRST)
    calls = counted(monkeypatch)
    other = digits.Study(tmp_path, SMALL, 4)
    other.result(FIRST)
    study.result(FIRST)
    assert len(calls) == 1, "one did not take the other's place"
    assert not torch.equal(other.base().blocks[0].mlp.fc1.weight, study.base().blocks[0].mlp.fc1.weight)


def test_merging_is_trained_from_the_base_on_the_same_pictures(study, monkeypatch):
    """As long, and by the same pictures, as the model without merging that it is compared with."""
    base = copy.deepcopy(study.base().state_dict())
    starts, shown, train = [], [], digits.train

    def spied(model, *more):
        starts.append(copy.deepcopy(model.state_dict()))
        shown.append([])
        hook = model.patch_embed.register_forward_pre_hook(lambda module, given: shown[-1].append(given[0]))
        train(model, *more)
        hook.remove()

    monkeypatch.setattr(digits, "train", spied)
    for r, by in ((0, "merge"), (25, "merge"), (25, "drop")):
        study.result(digits.Case(r, "training", by))
    for start in starts:
        assert start.keys() == base.keys()
        assert all(torch.equal(start[name], base[name]) for name in base)
    assert len(shown) == 3
    assert len(shown[0]) == 1
    for other in shown[1:]:
        assert all(torch.equal(a, b) for a, b in zip(shown[0], other, strict=True))


def test_digits_that_are_asked_about_were_not_learnt():
    data, again = digits.Digits(SMALL), digits.Digits(SMALL)
    for (own, labels), count in ((data.train, SMALL.train), (data.test, SMALL.test)):
        assert own.shape == (10 * count, 1, 28, 28)
        assert labels.bincount().tolist() == [count] * 10
        bars = own[:, 0, 4:24, 8:20].reshape(len(own), 10, -1).mean(2).argmax(1)
        assert torch.equal(bars, labels), "a picture keeps its label"
    assert torch.equal(data.test[0], again.test[0]), "the same for every seed"
    assert len(torch.cat([data.train[0], data.test[0]]).flatten(1).unique(dim=0)) == 10 * (SMALL.train + SMALL.test)


def test_pictures_are_moved_by_up_to_two_pixels():
    dots = torch.full((200, 1, 28, 28), -digits.MEAN / digits.DEVIATION)
    dots[:, 0, 5, 7] = 3
    moved = digits.shifted(dots, 2, torch.Generator().manual_seed(0))
    at = (moved[:, 0] == 3).nonzero()
    assert at[:, 0].tolist() == list(range(200))
    assert set(map(tuple, at[:, 1:].tolist())) == {(row, column) for row in range(3, 8) for column in range(5, 10)}
    assert moved.sort(-1).values.sort(-2).values.equal(dots.sort(-1).values.sort(-2).values), "nothing else appears"


@pytest.mark.slow
def test_the_model_learns(monkeypatch):
    monkeypatch.setitem(digits.MODEL, "depth", 1)  # learns soonest
    monkeypatch.setitem(digits.TRAINING, "shift", 0)
    data, model = digits.Digits(SMALL), digits.network()
    digits.train(model, data, 60, 1e-2, 0)
    assert (digits.predict(model, data.test[0]) == data.test[1]).float().mean() > 0.8


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # the real function
    monkeypatch.setattr(datasets.PathFinder, "find_spec", lambda *_: None)
    assert run(tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: mlxtend is not installed: ")
    assert "make fidelity" in said
    assert said.count("\n") == 1


def test_after_an_interrupt_the_same_call_goes_on(tmp_path, monkeypatch, capsys):
    predict, asked = digits.predict, []

    def interrupted(*given):
        asked.append(given)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return predict(*given)

    monkeypatch.setattr(digits, "predict", interrupted)
    assert run(tmp_path) == 130
    assert "the same call goes on" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()
    calls = counted(monkeypatch)
    monkeypatch.setattr(digits, "cases", lambda rates: [digits.Case(r, "inference", "merge") for r in rates])
    assert run(tmp_path) == 0
    assert len(asked) == 3, "the one that was done is not asked again"
    assert not calls, "nor is the model trained again"


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "rows.json").write_text("{}")
    assert run(tmp_path) == 2
    assert "--json" in capsys.readouterr().err
    assert not (tmp_path / "work").exists(), "before anything is trained"


# -- the page ---------------------------------------------------------------------------------------------------------


def invented(r: int, when: str, by: str, lost: float, apart: tuple[float, float] | None = None, **more) -> dict:
    """Return a row of five seeds."""
    return {
        "device": "CPU", "device_kind": "cpu", "cpus": 2, "threads": 2, "torch": "2.13.0", "triton": None,
        "driver": None, "pages": "reused", "commit": "a" * 40, "dirty": False, "date": "2026-01-01T00:00:00+00:00",
        "shape": f"r={r}", "n": 1500, "dtype": "float32", "op": "digits", "direction": when, "impl": by, "r": r,
        "tokens_in": 197, "tokens": [197 - r * layer for layer in range(1, 5)], "seeds": [0, 1, 2, 3, 4],
        "accuracy_mean": 96.04 - lost, "accuracy_spread": 0.26, "lost_mean": lost,
        "lost_interval": (lost - 0.5, lost + 0.5), "over_merging_interval": apart, "same_digit_mean": 97.66, **more,
    }  # fmt: skip


TIME = {"p20_us": 1e5, "p50_us": 1e5, "speedup": 1.25, "speedup_ideal": 1.5, "eta": 0.83}
ROWS = [
    invented(0, "inference", "merge", 0.0, **TIME | {"speedup": 1.0, "speedup_ideal": 1.0, "eta": 1.0, "p80_us": 1e5}),
    invented(25, "inference", "merge", 1.02, **TIME, p80_us=1e5),
    invented(25, "inference", "merge, sizes off", 2.0, (-0.1, 2.0)),
    invented(25, "inference", "random pairs", 9.0, (7.1, 8.0)),
    invented(25, "inference", "drop", 1.2, (0.1, 0.3), same_digit_mean=91.0),
    invented(25, "training", "merge", 0.3),
    invented(25, "training", "pool", 0.2, (-0.2, -0.1)),
]


def lines(rows: list[dict]) -> list[str]:
    return [line for part in page.tables(rows) for line in part.splitlines() if line.startswith("| r=")]


def test_tables_say_what_rows_hold():
    assert lines(ROWS) == [
        "| r=0, at inference alone | 197 (100 %) | accuracy 96.0 ± 0.3 |  |  |  |  |",
        "| r=25, at inference alone | 97 (49 %) | 1.0 (0.5 to 1.5) | 2.0 (1.5 to 2.5) | 9.0 (8.5 to 9.5)* "
        "| 1.2 (0.7 to 1.7)* |  |",
        "| r=25, in training too | 97 (49 %) | **0.3 (-0.2 to 0.8) (a baseline lost less)** |  |  |  "
        "| 0.2 (-0.3 to 0.7)† |",
        "| r=25 | 97 (49 %) | 97.7 % | 97.7 % | 97.7 % | 91.0 % |",
        "| r=0 | 197 (100 %) | 100 ms | 1.00× of 1.00× | 1.00 |",
        "| r=25 | 97 (49 %) | 100 ms | 1.25× of 1.50× | 0.83 |",
    ]
    equal = [ROWS[-2], ROWS[-1] | {"lost_mean": 0.26}]
    assert "| 0.3 (-0.2 to 0.8) |" in lines(equal)[0], "what is printed as the same is not marked"
    slower = [ROWS[1] | {"speedup": 0.9}]
    assert "**0.90×, slower**" in lines(slower)[-1]
    assert "1500 digits, 5 seeds" in page.tables(ROWS)[0]
