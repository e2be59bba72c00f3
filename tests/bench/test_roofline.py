# SPDX-License-Identifier: Apache-2.0
"""The model of the time of launches: counts by hand, bytes as tune.py has them, close to what an H200 measured."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("triton")

import roofline
from harness import block_model, gpu_stages, kernel_work, measurements, sass, shapes, variants
from harness.block_model import STACKS, forecast, patched, unpatched
from harness.kernel_work import Sizes
from harness.measurements import error_of
from harness.roofline import DEVICES, LAUNCH_US, Work, bound, bounds, flash, product, time_us

H200 = DEVICES["H200"]
LOOPS = {"match_item": 3, "score_blocks": 1, "plan_blocks": 4, "attend": 1}


def counted(launch):
    """Some counts: of the real kernels no test needs to compile any."""
    name, loops = launch[0].__name__, LOOPS.get(launch[0].__name__, 0)
    body = [[100, 10]] * (loops + (name == "attend" and launch[3]["MANY"]))
    return {"outside": [500, 20], "loops": body, "resident": 4}


def by_name(name: str) -> block_model.Stack:
    return next(stack for stack in STACKS if stack.name == name)


# -- what is committed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_committed_predictions_are_todays(run_script, tmp_path):
    """If not, a kernel, its configuration or the model has changed: python bench/roofline.py --help says what to do."""
    said = run_script("roofline.py", "--json", tmp_path / "now.json")
    committed = roofline.RESULTS / "roofline" / "predictions.json"
    assert json.loads((tmp_path / "now.json").read_text()) == json.loads(committed.read_text())
    assert "ViT-L/16 @384 r 23" in said
    assert {row["triton"] for row in json.loads(roofline.KERNELS.read_text())} == {"3.6.0"}, "what GPUs have"


def test_close_to_every_measurement():
    """The farthest is cuDNN's attention of one video, which the model has for two thirds of its time."""
    found = roofline.residuals()
    assert len(found) > 200
    assert {m.op for m in found} >= {
        "attend",
        "match",
        "reduce_rows",
        "norm_rows",
        "attention",
        "merge_norm",
        "product",
    }
    far = [m for m in found if not 1 / 1.53 < m.ratio < 1.53]
    assert not far, roofline.residual_table(far)
    assert error_of(found) < 1.12
    for op in {m.op for m in found}:
        assert error_of(m for m in found if m.op == op) < 1.2, op


def test_a_configuration_that_nobody_counted_is_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "KERNELS", tmp_path / "kernels.json")
    assert roofline.main(["--device", "H200"]) == 1
    said = capsys.readouterr()
    assert "kernels.json does not have this kernel: attend " in said.err
    assert "--help" in said.err


def test_a_kernel_that_has_changed_is_counted_again():
    """The text of a kernel is part of what is remembered."""
    s = Sizes(1, 9, 24, 1, 1, 3)
    turns = []

    def compiler(launch, through_loops):
        turns.append(through_loops)
        return counted(launch)

    known = kernel_work.Counted({}, compiler)
    kernel_work.merge_work(s, known)
    kernel_work.merge_work(s, known)
    assert turns == [False]
    (row,) = known.rows.values()
    assert known.used == {row["key"]}
    row["source"] = "another"
    kernel_work.merge_work(s, known)
    assert turns == [False, False]


# -- the model --------------------------------------------------------------------------------------------------------


def test_bounds_by_hand():
    work = Work(
        "any", 3_600_000_000, flops=989e9, exponentials=16 * 132 * 1755.0, programs=132 * 8, warps=4, resident=4,
        rounds=5, instructions=1755, shared=1755,
    )  # fmt: skip
    found = bounds(work, H200)
    assert found == pytest.approx({
        "bytes": 1000.0,  # 3.6 GB at nine tenths of 4.0 TB/s
        "tensor": 1000.0,
        "exponentials": 1.0,
        "issue": 8 / 0.7,  # 8 programs of 4 warps on 4 schedulers, a cycle an instruction at best
        "shared": 32.0,  # 32 warps one after the other
        "chain": 2 * (5 * 0.6 + 3.5),  # two programs one after the other
        "tiles": 0.0,
    })  # fmt: skip
    assert bound(replace(work, nbytes=0, flops=0), H200) == "shared"
    assert time_us(work, H200) == LAUNCH_US + 1000
    alone = replace(work, nbytes=0, flops=0, programs=1, shared=0)
    assert bounds(alone, H200)["chain"] == pytest.approx(5 * 0.6 + 3.5)  # no shorter than one program


@pytest.mark.slow
def test_bytes_are_those_that_tune_counts():
    shape = replace(shapes.SHAPES["stop-b32-video-r2"], n_cpu=2, tokens=9, dim=128, heads=2, protected=1, r=3)
    inputs = shapes.make(shape, "cpu", torch.bfloat16)
    s = Sizes(2, 9, 128, 2, 1, 3)
    for kernel, works in (
        ("match", kernel_work.match_work(s, counted)), ("reduce_rows", kernel_work.merge_work(s, counted)),
        ("norm_rows", kernel_work.merge_norm_work(s, counted)),
        ("attend", kernel_work.attend_work(replace(s, prefix=4), counted)),
    ):  # fmt: skip
        assert sum(work.nbytes for work in works) == variants.KERNELS[kernel].job(inputs).nbytes, kernel


def test_the_sets_are_those_of_the_reference():
    for tokens in (9, 10, 54):
        for protected in (0, 1, 2, 5):
            ranges = [range(*part.indices(tokens)) for part in shapes.reference.match_sets(tokens, protected)]
            assert Sizes(1, tokens, 64, 1, protected, 1).sets == tuple(len(part) for part in ranges)


@pytest.mark.parametrize("name", ["STOP B/32 r 8", "ViT-L/16 @384 r 23"])
def test_more_items_take_longer(name):
    stack = by_name(name)
    times = [forecast(stack, batch, H200, counted) for batch in (1, 3, 8, 20, 64, 65, 256, 1024)]
    for earlier, later in pairwise(times):
        assert earlier.patched_us <= later.patched_us
        assert earlier.unpatched_us <= later.unpatched_us


def test_more_of_everything_takes_longer():
    for rows in (16, 197, 600, 50000):
        assert product("", rows, 768, 768, H200).tiles_us <= product("", rows + 1, 768, 768, H200).tiles_us
        assert product("", rows, 768, 768, H200).tiles_us < product("", rows, 3072, 768, H200).tiles_us
    long, short = (flash(64, 12, 197, keys, 64, H200) for keys in (577, 197))
    assert long.tiles_us > short.tiles_us


def test_fast_products_and_attention_are_no_faster_than_the_device():
    for work in (product("", 76800, 768, 3072, H200), flash(8, 16, 4096, 4096, 64, H200)):
        assert bounds(work, H200)["tensor"] < work.tiles_us


def test_merging_that_costs_nothing_gains_what_flops_say(monkeypatch):
    """η is about 1 where all other launches shrink with the tokens; exactly 1 where nothing is merged."""
    monkeypatch.setattr(block_model, "attend_work", lambda s, _: [block_model.attention(s, H200)])
    monkeypatch.setattr(block_model, "match_work", lambda *_: [])
    monkeypatch.setattr(block_model, "merge_norm_work", lambda s, _: block_model.add_and_norm(replace(s, tokens=s.out)))
    for name in ("ViT-B/16 r 13", "ViT-L/16 @384 r 23"):
        assert 0.93 < forecast(by_name(name), 256, H200, counted).eta < 1.07, name
        nothing = forecast(replace(by_name(name), r=0), 8, H200, counted)
        assert nothing.eta == pytest.approx(1)
        assert nothing.merging_us == 0


def test_a_block_holds_the_launches_of_a_forward():
    """bench/launches.py counts one attend, one match_item and one norm_rows in a block of STOP's that merges."""
    s = by_name("STOP B/32 r 2").sizes(1, 54, 2)
    names = [work.name for work in patched(s, H200, counted)]
    assert names == [
        "LayerNorm", "QKV", "attend", "projection", "match_item", "norm_rows", "MLP up", "GELU", "MLP down", "add"
    ]  # fmt: skip
    assert len(unpatched(s, H200)) == len(names)


# -- beside measurements ----------------------------------------------------------------------------------------------


def row(**changes) -> dict:
    """A row of fused.py, with what read_rows asks for."""
    return {
        "device": "NVIDIA H200", "threads": 1, "pages": None, "torch": "2", "shape": "vit-b16-r16", "n": 256,
        "dtype": "bfloat16", "op": "attention", "direction": "forward", "impl": "sdpa, no sizes", "p50_us": 170.5,
        "commit": "a", **changes,
    }  # fmt: skip


def test_against_finds_what_it_can(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(roofline, "count", lambda launch, through_loops: counted(launch))
    monkeypatch.setattr(roofline, "KERNELS", tmp_path / "kernels.json")
    ours = {"impl": "triton", "op": "match+merge", "graph_us": 90.0}
    left_out = (
        row(device="NVIDIA A100"), row(device="none"), row(dtype="float32"), row(direction="forward+backward"),
        row(shape="sd-512"), row(shape="tempme-b32-clip12"), row(p50_us=None), row(impl="concatenated, mask"),
        row(op="unmerge", impl="triton"), row(shape="vit-l16-577", impl="augmented"),
    )  # fmt: skip
    long = {"shape": "vit-l16-577", "n": 64}
    (tmp_path / "fused.json").write_text(
        json.dumps([row(), row(**ours), *left_out, row(**long, impl="attention"), row(**long, impl="flash, no sizes")])
    )
    (tmp_path / "tune.json").write_text("no rows")
    files = [str(tmp_path / name) for name in ("rows.json", "fused.json", "tune.json")]
    assert roofline.main(["--against", *files, "--json", str(tmp_path / "out.json")]) == 0
    said = capsys.readouterr().out
    assert said.count("left out:") == 2
    found = [measurements.from_columns(r) for r in json.loads((tmp_path / "out.json").read_text())]
    assert [(m.op, m.how, len(m.works)) for m in found] == [
        ("attention", "events", 1), ("match+merge", "graph", 2), ("match+merge", "events", 2),
        ("attention", "events", 1), ("attention", "events", 1),
    ]  # fmt: skip
    assert found[0].ratio == pytest.approx(1, abs=0.01)
    assert "vit-b16-r16         256    170.5    171.0  1.00  tiles, events, sdpa, no sizes" in said
    assert roofline.main(["--against", str(tmp_path / "rows.json")]) == 0
    assert "nothing there that the model describes" in capsys.readouterr().out


def test_rows_have_the_configuration_of_their_commit(monkeypatch):
    """As tune.py measured it; a variant only where it is asked for."""
    seen = []

    def count(launch):
        seen.append(launch[3]["num_warps"])
        return counted(launch)

    config = {"D": 768, "ROWS": 8, "BLOCK_D": 256, "CHUNKS": 3, "num_warps": 4, "num_stages": 1}
    tuned = row(op="reduce_rows", impl="default", config=config)
    other = row(op="reduce_rows", impl="num_warps=2", config={**config, "num_warps": 2})
    rows = [tuned, other, row(op="merge", impl="triton"), row(op="merge", impl="triton", commit="b")]
    assert len([*measurements.measurements(rows, count)]) == 3
    assert seen == [4, 4, 1]  # as tuned, as in that commit, as today
    assert len([*measurements.measurements(rows, count, True)]) == 4


def test_the_suite_ends_with_the_model():
    for plan in (gpu_stages.FIRST, gpu_stages.BENCH):
        *earlier, stage = plan
        assert stage.name == "roofline"
        written = {word for other in earlier for word in other.arguments if word.endswith(".json")}
        assert {*stage.arguments[1:]} <= written
        args = roofline.arguments(list(stage.arguments))
        assert len(args.against) == 4


# -- instructions -----------------------------------------------------------------------------------------------------

CODE = """
		Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;            /* 0x0000000000007919 */
        /*0010*/                   ISETP.GE.AND P0, PT, R0, 0x4, PT ;
        /*0020*/               @P0 BRA 0xc0 ;
        /*0030*/                   LDS.128 R4, [R0] ;
        /*0040*/                   SHFL.BFLY PT, R5, R4, 0x1, 0x1f ;
        /*0050*/                   FADD R4, R4, R5 ;
        /*0060*/               @P1 BRA 0xa0 ;
        /*0070*/                   FMUL R4, R4, R4 ;
        /*0080*/               @P2 BRA 0x30 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   MUFU.RCP R4, R4 ;
        /*00b0*/                   BRA 0x70 ;
        /*00c0*/                   STS [R0], R4 ;
        /*00d0*/                   EXIT ;
        /*00e0*/                   BRA 0xe0;
        /*00f0*/                   NOP;
"""


def test_instructions_by_hand():
    """A loop from 0x30 to 0x80; the block at 0xa0 that jumps back into it is rare, not a loop."""
    found = sass.executed(CODE, through_loops=True)
    # before the loop 3 instructions, behind it one; in it 6, of which the first takes 4 cycles of shared memory, the
    # second one
    assert found == {"outside": [4, 0], "loops": [[6, 5]]}
    assert sass.executed(CODE, through_loops=False) == {"outside": [5, 1], "loops": []}, "past the loop"


def test_inner_loops_are_counted_apart():
    code = """Function : kernel
        /*0000*/ MOV R0, 0x1 ;
        /*0010*/ MOV R1, 0x1 ;
        /*0020*/ LDS.64 R2, [R1] ;
        /*0030*/ FADD R2, R2, R2 ;
        /*0040*/ @P0 BRA 0x20 ;
        /*0050*/ STS [R1], R2 ;
        /*0060*/ @P1 BRA 0x10 ;
        /*0070*/ EXIT ;
    """
    # the outer one has its first instruction and two behind the inner one
    assert sass.executed(code, True) == {"outside": [2, 0], "loops": [[3, 1], [3, 2]]}
