# SPDX-License-Identifier: Apache-2.0
"""Plans from nowhere: a plan whose groups don't hold each token of every item once is an error on the CPU, by every
operator and backend; on a GPU, where raising would wait, nothing leaves its item and no row is left unwritten."""

import dataclasses
import itertools
import os
import random
import re
import subprocess
import sys

import pytest
import stoptome_kernels as stk
import torch
from stoptome_kernels.reference import merging
from torch import Tensor

from support.fuzz import rounds

OPS = torch.ops.stoptome
TOKENS, OUT, DIM = 9, 7, 5
torch.manual_seed(3)
PLAN = stk.match(torch.randn(3, TOKENS, 4), TOKENS - OUT, 1)
X, Y, SIZE, ROW = torch.randn(3, TOKENS, DIM), torch.randn(3, OUT, DIM), torch.rand(3, TOKENS) + 0.5, torch.randn(DIM)
MEAN, RSTD = torch.randn(3, OUT), torch.rand(3, OUT) + 0.5


def member(place: int, value: int):
    def damage(members, offsets):
        members[1, place] = value

    return damage


def offset(place: int, value: int):
    def damage(members, offsets):
        offsets[1, place] = value

    return damage


def twice(members, offsets):
    members[1, 4] = members[1, 7]


def twice_without_weight(members, offsets):
    members[1, 4] = ~members[1, 4 - 1]


def swapped(members, offsets):
    offsets[1, [2, 4]] = offsets[1, [4, 2]]


DAMAGE = {
    **{f"member {value}": member(4, value) for value in (TOKENS, 10**6, 2**31 - 1, ~TOKENS, -(2**31))},
    "a member twice": twice, "a member twice, once without weight": twice_without_weight,
    "offsets that fall": swapped, "an empty group": lambda _, offsets: offset(3, int(offsets[1, 2]))(_, offsets),
    **{f"offset {place} is {value}": offset(place, value)
       for place, value in ((0, 1), (0, -1), (0, -(10**7)), (3, -5), (3, TOKENS + 1), (3, 2**31 - 1), (OUT, TOKENS - 1),
                            (OUT, TOKENS + 1), (OUT, 10**8), (OUT, -(2**31)))},
}  # fmt: skip


def operators(backend: str) -> dict:
    """Every operator that takes a plan, of ``(members, offsets)``; and what it gives."""
    found = {}
    for mode in ("mean", "sum", "max"):
        found[f"merge {mode}"] = lambda m, o, mode=mode: OPS.merge(X, m, o, SIZE, mode, backend)
        given = (X, Y) if mode == "max" else (None, None)
        found[f"grad of merge {mode}"] = lambda m, o, mode=mode, given=given: OPS.merge_backward(
            Y, m, o, SIZE, *given, mode, backend
        )

    def merge_out(m, o):
        out = torch.full_like(Y, 7), torch.full_like(MEAN, 7)
        OPS.merge_out(X, m, o, SIZE, "mean", backend, *out)
        return out

    return found | {
        "merge_out": merge_out,
        "unmerge": lambda m, o: OPS.unmerge(Y, m, o, backend),
        "grad of unmerge": lambda m, o: OPS.unmerge_backward(X, m, o, backend),
        "merge_norm": lambda m, o: OPS.merge_norm(X, X, m, o, SIZE, ROW, ROW, 1e-5, backend),
        "grad of merge_norm": lambda m, o: OPS.merge_norm_backward(Y, Y, Y, MEAN, RSTD, m, o, SIZE, ROW, True, backend),
    }


SPREADING = ("grad of merge mean", "grad of merge sum", "grad of merge max", "unmerge", "grad of merge_norm")


def damaged(name: str) -> tuple[Tensor, Tensor]:
    members, offsets = PLAN.members.clone(), PLAN.offsets.clone()
    DAMAGE[name](members, offsets)
    return members, offsets


def first(given) -> Tensor:
    return given if isinstance(given, Tensor) else given[0]


@pytest.mark.parametrize("operator", operators("auto"))
@pytest.mark.parametrize("cpu", ["native", "reference"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_error_that_names_the_item(cpu, damage, operator):
    with pytest.raises(IndexError, match=f"^plan is damaged: the groups of item 1 don't hold each of its {TOKENS} tok"):
        operators(cpu)[operator](*damaged(damage))


@pytest.mark.parametrize("cpu", ["native", "reference"])
def test_groups_that_miss_tokens(cpu):
    """The issue's own: four groups, whose offsets end before the six tokens do."""
    members, offsets = torch.arange(6, dtype=torch.int32)[None], torch.arange(5, dtype=torch.int32)[None]
    with pytest.raises(IndexError, match="item 0 don't hold each of its 6 tokens once"):
        OPS.unmerge(torch.ones(1, 4, 3), members, offsets, cpu)
    with pytest.raises(IndexError, match="item 0 don't hold each of its 6 tokens once"):
        stk.unmerge(torch.ones(1, 4, 3), stk.MergePlan(members, members, offsets, 0), cpu)


@pytest.fixture
def dirty(monkeypatch):
    """Memory that is not NaN before anybody writes it, as a GPU's is."""
    empty = Tensor.new_empty

    def new_empty(self, *args, **options):
        return empty(self, *args, **options).fill_(7)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="test_gpu.py has it where there is a GPU")
@pytest.mark.parametrize("damage", DAMAGE)
def test_no_row_is_left_unwritten_on_a_gpu(dirty, damage):
    """Rows of tokens that no group holds become NaN, all others are written by their groups; other items as ever."""
    members, offsets = damaged(damage)
    others = torch.tensor([0, 2])
    for name, operator in operators("triton").items():
        if damage != "a member twice" and name not in ("unmerge", "grad of merge_norm"):
            continue
        got, want = first(operator(members, offsets)), first(operator(PLAN.members, PLAN.offsets))
        assert torch.equal(got[others], want[others]), name
        if name in SPREADING:
            assert not (got[1] == 7).any(), name
    held = held_by(members[1].tolist(), offsets[1].tolist())
    lost = OPS.unmerge(Y, members, offsets, "triton")[1].isnan().all(-1)
    assert lost.tolist() == [token not in held for token in range(TOKENS)]


def held_by(members: list[int], offsets: list[int]) -> set[int]:
    """The tokens that the groups hold when every index is moved to the nearest that there is."""
    tokens, held = len(members), set()
    for begin, end in itertools.pairwise(offsets):
        begin = min(max(begin, 0), tokens)
        for code in members[begin : min(max(end, begin), tokens)]:
            held.add(min(~code if code < 0 else code, tokens - 1))
    return held


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_reference_marks_items_where_it_can_not_raise(monkeypatch, damage):
    monkeypatch.setattr(merging, "can_raise", lambda tensor: False)
    members, offsets = damaged(damage)
    for name, operator in operators("reference").items():
        got, want = first(operator(members, offsets)), first(operator(PLAN.members, PLAN.offsets))
        assert got[1].isnan().all(), name
        assert torch.equal(got[[0, 2]], want[[0, 2]]), name


def composed(which: str, **change: Tensor) -> stk.MergePlan:
    """Two plans composed, of which one has other tensors."""
    plans = {"this plan": PLAN, "following": stk.match(torch.randn(3, OUT, 4), 2)}
    for name, value in change.items():
        tensor = getattr(plans[which], name).clone()
        tensor[1] = value
        plans[which] = dataclasses.replace(plans[which], **{name: tensor})
    return plans["this plan"].then(plans["following"])


@pytest.mark.parametrize("which", ["this plan", "following"])
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("dest", -1, "is damaged: its dest and its groups send tokens to different outputs"),
        ("dest", 0, "is damaged: its dest and its groups send tokens to different outputs"),
        ("dest", 2**31 - 1, "is damaged: its dest and its groups send tokens to different outputs"),
        ("members", 0, "plan is damaged: the groups of item 1 don't hold"),
        ("members", -1, "plan is damaged: the groups of item 1 don't hold"),
        ("offsets", 99, "plan is damaged: the groups of item 1 don't hold"),
    ],
)
def test_composing(which, name, value, says):
    with pytest.raises(IndexError, match=f"^{which}:? {re.escape(says)}"):
        composed(which, **{name: value})


@pytest.mark.parametrize("which", ["this plan", "following"])
def test_composing_where_asking_would_wait(monkeypatch, which):
    """A token goes to the nearest output that there is, and no index leaves its range."""
    monkeypatch.setattr("stoptome_kernels.checks.can_read", lambda tensor: False)
    for value in (-1, 2**31 - 1):
        plan = composed(which, dest=value)
        assert ((plan.dest >= 0) & (plan.dest < plan.tokens_out)).all()


@pytest.mark.parametrize("cpu", ["native", "reference", "auto"])
def test_a_plan_that_merges_nothing_moves_nothing(cpu):
    plan, row = stk.match(torch.randn(3, TOKENS, 4), 0), torch.ones(DIM)
    for change in ({"members": plan.members * 0}, {"members": plan.members.flip(1)}, {"offsets": plan.offsets * 0}):
        wrong = dataclasses.replace(plan, **change)
        for call in (
            lambda wrong=wrong: stk.merge(X, wrong, backend=cpu),
            lambda wrong=wrong: stk.unmerge(X, wrong, backend=cpu),
            lambda wrong=wrong: stk.merge_norm(X, X, wrong, None, row, row, backend=cpu),
        ):
            with pytest.raises(IndexError, match=r"^plan is damaged: it has r = 0, but moves tokens; it was"):
                call()
    assert stk.merge(X, plan, backend=cpu)[0] is X


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"dest": None}, TypeError, "dest must be a dense tensor, got NoneType"),
        ({"members": [[0]]}, TypeError, "members must be a dense tensor, got list"),
        ({"offsets": "x"}, TypeError, "offsets must be a dense tensor, got str"),
        ({"dest": PLAN.dest[:, :8]}, ValueError, r"dest must be int32 and of members' shape \(N, T\) = \(3, 9\)"),
        ({"dest": PLAN.dest.long()}, ValueError, "dest must be int32"),
        ({"members": PLAN.members[0]}, ValueError, "members must be 2-D int32, got 1-D"),
        ({"members": PLAN.members.float()}, ValueError, "members must be 2-D int32, got 2-D torch.float32"),
        ({"members": PLAN.members.to("meta")}, ValueError, "members is on meta, but .*dest on cpu"),
        ({"members": PLAN.members.to_sparse()}, TypeError, "members must be a dense tensor, got torch.sparse_coo"),
        ({"offsets": PLAN.offsets[0]}, ValueError, "offsets must be 2-D int32, got 1-D"),
        ({"offsets": PLAN.offsets.long()}, ValueError, "offsets must be 2-D int32, got 2-D torch.int64"),
        ({"offsets": PLAN.offsets[:2]}, ValueError, "do not belong together"),
    ],
)
def test_parts_of_other_types(change, error, says):
    plan = dataclasses.replace(PLAN, **change)
    row = torch.ones(DIM)
    for call in (
        lambda: stk.merge(X, plan),
        lambda: stk.unmerge(Y, plan),
        lambda: stk.merge_norm(X, X, plan, None, row, row),
        lambda: plan.then(PLAN),
    ):
        with pytest.raises(error, match=says):
            call()


# -- whatever may come ------------------------------------------------------------------------------------------------


def is_whole(members: list[int], offsets: list[int]) -> bool:
    rises = all(a < b for a, b in itertools.pairwise(offsets))
    tokens = sorted(~code if code < 0 else code for code in members)
    return rises and offsets[0] == 0 and offsets[-1] == len(members) and tokens == [*range(len(members))]


def drawn(draw: random.Random) -> tuple[list[list[int]], list[list[int]]]:
    """Members and offsets of a few items: whole, nearly whole, or anything."""
    tokens = draw.randint(1, 7)
    out = draw.randint(1, tokens)
    members, offsets = [], []
    for _ in range(draw.randint(1, 3)):
        row = [code if draw.random() < 0.8 else ~code for code in draw.sample(range(tokens), tokens)]
        ends = [0, *sorted(draw.sample(range(1, tokens), out - 1)), tokens]
        for values in (row, ends):
            if draw.random() < 0.3:
                near = draw.choice([draw.randint(-2, tokens + 1), draw.randint(-(2**31), 2**31 - 1)])
                values[draw.randrange(len(values))] = near
        members.append(row)
        offsets.append(ends)
    return members, offsets


def by_hand(y: Tensor, members: list[list[int]], offsets: list[list[int]]) -> Tensor:
    out = torch.full((len(members), len(members[0]), y.shape[2]), torch.nan)
    for item, (row, ends) in enumerate(zip(members, offsets, strict=True)):
        for group, (begin, end) in enumerate(itertools.pairwise(ends)):
            for code in row[begin:end]:
                out[item, ~code if code < 0 else code] = y[item, group]
    return out


@pytest.mark.parametrize("cpu", ["native", "reference"])
def test_fuzz_drawn_plans(cpu):
    """Refused if and only if it is damaged; else what each group says is in each of its tokens."""
    draw, refused = random.Random(15), 0
    for _ in range(rounds(400)):
        members, offsets = drawn(draw)
        y = torch.randn(len(members), len(offsets[0]) - 1, 3)
        plan = torch.tensor(members, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
        try:
            got = OPS.unmerge(y, *plan, cpu)
        except IndexError as error:
            refused += 1
            item = next(i for i, pair in enumerate(zip(members, offsets, strict=True)) if not is_whole(*pair))
            found = str(error)
            wanted = f"plan is damaged: the groups of item {item} don't"
        else:
            assert all(map(is_whole, members, offsets)), (members, offsets)
            assert torch.equal(got, by_hand(y, members, offsets)), (members, offsets)
            found = wanted = ""
        assert found.startswith(wanted), (members, offsets)
    assert rounds(400) / 4 < refused < rounds(400) * 3 / 4


RACE = """
import threading, time, torch, stoptome_kernels as stk
torch.set_num_threads(2)
N, T, D = 64, 300, 32
plan = stk.match(torch.randn(N, T, 8), 100)
x, y = torch.randn(N, T, D), torch.randn(N, T - 100, D)
weight, mean = torch.ones(D), torch.zeros(N, T - 100)
good = plan.members.clone(), plan.offsets.clone()
end, calls, refused = time.monotonic() + {seconds}, 0, 0

def scribble():
    while time.monotonic() < end:
        for value in (2**31 - 1, -(2**31), 5):
            plan.members[:, ::7] = value
            plan.offsets[:, 1::5] = value
            plan.members.copy_(good[0])
            plan.offsets.copy_(good[1])

after = stk.match(torch.randn(N, T - 100, 8), 50)

def scribble_dest():
    kept = plan.dest.clone()
    while time.monotonic() < end:
        plan.dest[:, 1::5] = 2**30
        plan.dest.copy_(kept)

threads = [threading.Thread(target=scribble), threading.Thread(target=scribble_dest)]
for thread in threads:
    thread.start()

def compose(m, o):
    assert (plan.then(after).dest < T - 150).all()

ops = torch.ops.stoptome
run = [
    lambda m, o: ops.merge(x, m, o, None, "mean", "native"),
    lambda m, o: ops.merge_backward(y, m, o, None, x, y, "max", "native"),
    lambda m, o: ops.unmerge(y, m, o, "native"),
    lambda m, o: ops.merge_norm(x, x, m, o, None, weight, weight, 1e-5, "native"),
    lambda m, o: ops.merge_norm_backward(y, y, y, mean, mean, m, o, None, weight, True, "native"),
    compose,
]
while time.monotonic() < end:
    for op in run:
        calls += 1
        try:
            op(plan.members, plan.offsets)
        except IndexError:
            refused += 1
for thread in threads:
    thread.join()
assert 0 < refused < calls, (refused, calls)
"""


@pytest.mark.slow
def test_a_plan_that_another_thread_changes_during_the_call():
    """Read once, then checked, then used: an error or a result, never an address out of range."""
    code = RACE.format(seconds=2 * rounds(1))
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_memory_that_is_not_there_is_said_in_bytes():
    """One row of data stands for all tokens; what matching needs to work in does not fit anywhere."""
    metric = torch.zeros(2**24).expand(1, 2**22, -1)
    with pytest.raises(MemoryError, match=r"stoptome_kernels can't allocate \d{12,} bytes of memory"):
        stk.match(metric, 1, backend="native")


def test_no_rows_take_no_memory_however_wide():
    plan = stk.match(torch.zeros(0, 9, 4), 2)
    x = torch.zeros(1).expand(0, 9, 2**45)
    row = torch.ones(1).expand(2**45)
    with pytest.raises(RuntimeError, match="allocate memory: you tried to allocate"):  # of the parameters, by torch
        stk.merge_norm(x, x, plan, None, row, row, backend="native")
    y, rows, _ = stk.merge_norm(x, x, plan, None, backend="native")
    assert y.shape == rows.shape == (0, 7, 2**45)
