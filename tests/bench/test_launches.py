# SPDX-License-Identifier: Apache-2.0
"""What reaches a GPU, without one: kernels of a block and of whole models, variants compiled, and what the launch path
asks of torch. All from one process, in which a driver that launches nothing stands under Triton's own compiler."""

import json
import sys
from collections import Counter
from importlib.util import find_spec

import pytest

from support import ROOT, no_gpu

RESULTS = ROOT / "bench/results/launches"
STOP, VIT, CLIP = "STOP ViT-B/32, 12 frames, ", "ViT-B/16, r=13", "CLIP ViT-B/32 (open_clip), r=13"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux"),
]


@pytest.fixture(scope="module")
def found() -> dict:
    """The answers of support/launch_path.py."""
    return no_gpu.answers("launch_path.py")


@pytest.fixture(scope="module")
def rows(found) -> dict:
    return {(row["model"], row["direction"]): row for row in found["rows"]}


@pytest.mark.parametrize(
    ("r", "forward", "gradient"),
    [
        # one for the frames, one for the global prompts, which look at all 12·54 keys
        (0, ["attend", "attend"], ["grad_queries", "grad_keys", "grad_item"]),
        (
            2,
            ["attend", "attend", "match_item", "norm_rows"],
            ["norm_grad_rows", "grad_queries", "grad_keys", "grad_item"],
        ),
    ],
)
def test_a_block(found, r, forward, gradient):
    """The kernels of a STOP block in the middle of the stack, in order; as many variants, none compiled twice."""
    for which in ("", ", two videos", ", fewer tokens"):
        block = found["blocks"][f"r={r}{which}"]
        assert block["forward"]["launches"] == forward
        assert block["gradient"]["launches"] == gradient
    block = found["blocks"][f"r={r}"]
    assert (block["forward"]["compiled"], block["gradient"]["compiled"]) == (forward, gradient)


@pytest.mark.parametrize(
    ("model", "inference", "training"),
    [
        # in each layer the frames, whose gradient is one kernel, and the prompts, which look at a whole video
        (STOP + "r=0", {"attend": 24}, {"grad_queries": 12, "grad_keys": 12, "grad_item": 12}),
        (
            STOP + "r=2",
            {"attend": 24, "match_item": 11, "norm_rows": 11},
            {"grad_queries": 12, "grad_keys": 12, "grad_item": 12, "norm_grad_rows": 11},
        ),
        (
            STOP + "r=8",
            {"attend": 24, "match_item": 9, "norm_rows": 9},
            {"grad_queries": 12, "grad_keys": 12, "grad_item": 12, "norm_grad_rows": 9},
        ),
        # three layers join frames: one more matching each, and a plain merge
        (
            STOP + "memory",
            {"attend": 24, "match_item": 11 + 3, "norm_rows": 11, "reduce_rows": 3},
            {"grad_queries": 19, "grad_keys": 19, "grad_item": 5, "norm_grad_rows": 11, "spread_rows": 3},
        ),
        # plain attention in the first layer is torch's own; in the last 64 keys and fewer take one kernel backward
        (
            VIT,
            {"attend": 11, "match_item": 12, "norm_rows": 12},
            {"grad_queries": 10, "grad_keys": 10, "grad_item": 1, "norm_grad_rows": 12},
        ),
        # after seven layers there is nothing left to merge
        (
            CLIP,
            {"attend": 11, "match_item": 7, "norm_rows": 7},
            {"grad_item": 11, "norm_grad_rows": 7},
        ),
    ],
)
def test_a_model(rows, model, inference, training):
    """All kernels of a forward, and those that the gradient adds; a second batch size compiles nothing."""
    if (model, "inference") not in rows:
        pytest.skip("its library is not installed")
    one, step = rows[model, "inference"], rows[model, "training"]
    assert one["kernels"] == inference
    assert step["kernels"] == inference | training
    assert (one["compiled_for_two"], step["compiled_for_two"]) == (0, 0)
    assert (one["waits"], step["waits"]) == ([], [])


def test_a_block_of_each_model(rows):
    """In the second block of every tower; the first of a ViT has no sizes yet, in the last of STOP none are read."""
    for (model, _), row in rows.items():
        merges = [] if model == STOP + "r=0" else ["match_item", "norm_rows"]
        attended = ["attend"] * (2 if model.startswith(STOP) else 1)
        assert row["blocks"][1] == [*attended, *merges]
        assert len(row["blocks"]) == 12
        assert row["blocks"][0] == (merges if model in (VIT, CLIP) else [*attended, *merges])
        assert "norm_rows" not in row["blocks"][11] or model == VIT


def test_variants_as_committed(found, rows):
    """A change of the kernels that compiles more (a longer cold start), or less, changes the committed rows."""
    file = RESULTS / f"triton-{found['triton']}.json"
    if not file.exists():
        pytest.skip(f"no rows for Triton {found['triton']}: python bench/launches.py --json")
    committed = {(row["model"], row["direction"]): row for row in json.loads(file.read_text())}
    for key, row in rows.items():
        assert row["variants"] == committed[key]["variants"], key
        assert row["kernels"] == committed[key]["kernels"], key
        assert row["compiled"] == sum(row["variants"].values())


KERNELS = {
    "match": ["match_item"],
    "merge": ["reduce_rows"],
    "merge, gradient": ["spread_rows"],
    "unmerge": ["spread_rows"],
    "unmerge, gradient": ["reduce_rows"],
    "merge_norm": ["norm_rows"],
    "merge_norm, gradient": ["norm_grad_rows"],
    "attention": ["attend"],
    "attention, gradient": ["grad_item"],
}


def test_kernels_of_each_op(found):
    for shape in ("video", "image"):
        expected = dict(KERNELS)
        if shape == "image":  # more keys than a block of them
            expected["attention, gradient"] = ["grad_queries", "grad_keys"]
        assert {name: op["launches"] for name, op in found["ops"][shape].items()} == expected
        assert {name: op["compiled"] for name, op in found["ops"][shape].items()} == expected


def test_nothing_new_is_compiled(found):
    """For another number of items, nor for another number of tokens under the same power of two; half as many do."""
    for shape in ("video", "image"):
        for change in ("more items", "fewer tokens", "fewer left"):
            compiled = {name: op["compiled"] for name, op in found["ops"][f"{shape}, {change}"].items()}
            assert compiled == {key: [] for key in KERNELS}, f"{shape}, {change}"
        assert found["ops"][f"{shape}, half the tokens"]["match"]["compiled"] == ["match_item"]
    for r in (0, 2):
        for change in ("two videos", "fewer tokens"):
            block = found["blocks"][f"r={r}, {change}"]
            assert (block["forward"]["compiled"], block["gradient"]["compiled"]) == ([], [])


def test_what_the_launch_path_asks_of_torch(found):
    """Memory for the results, views of it, and sums of partial ones; nothing that waits for the device."""
    three_heads = {"new_empty_strided": 3, "new_empty": 2, "view": 2, "sum": 2, "_to_copy": 2}  # and the prefix's parts
    expected = {
        "match": {"new_empty": 2, "empty_like": 1},
        "merge": {"new_empty": 2},
        "merge, gradient": {"new_empty": 1},
        "unmerge": {"new_empty": 1},
        "unmerge, gradient": {"new_empty": 2},
        "merge_norm": {"new_empty": 2, "empty_like": 3, "promote_types": 1},
        "merge_norm, gradient": {"new_empty": 2, "sum": 1},  # the programs' sums for weight and bias
        "attention": {"new_empty_strided": 1, "new_empty": 1},
        "attention, gradient": three_heads,
    }
    for name, wanted in expected.items():
        assert Counter(found["ops"]["video"][name]["operations"]) == wanted, name
    image = Counter(found["ops"]["image"]["attention, gradient"]["operations"])
    assert image == three_heads | {"new_empty": 4}  # two more: what one kernel leaves for the other
    assert not any(op["waits"] for shape in found["ops"].values() for op in shape.values())
    assert not any(way["waits"] for block in found["blocks"].values() for way in block.values())
