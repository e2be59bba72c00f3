# SPDX-License-Identifier: Apache-2.0
"""The history of evaluations in a folder, and folders of calls that were refused."""

import multiprocessing
import time

import pytest

from retrieval import lock, results, state, terminal
from retrieval.corpus import Split, Video
from retrieval.errors import UsageError
from support.retrieval import refused


def training(epoch: int, run: str = "") -> dict:
    return {"kind": "training", "weights": {"epoch": epoch}, "run": run}


OTHER = {"kind": "evaluation", "weights": {}}


@pytest.mark.parametrize(
    ("there", "new", "resumed", "left"),
    [
        ([], training(1), False, [training(1)]),
        ([training(1), OTHER], training(2), True, [training(1), OTHER, training(2)]),
        # killed before the checkpoint of epoch 2, or of epochs 2 and 3
        ([training(1), training(2, "old"), OTHER], training(2), True, [training(1), OTHER, training(2)]),
        ([training(1), training(2, "old"), training(3, "old")], training(2), True, [training(1), training(2)]),
        # an earlier training in the same folder keeps its own
        ([training(1, "old"), training(2, "old")], training(1), False,
         [training(1, "old"), training(2, "old"), training(1)]),
        ([training(1, "old"), training(2, "old"), training(1, "killed")], training(1), True,
         [training(1, "old"), training(2, "old"), training(1)]),
        ([training(1)], OTHER, False, [training(1), OTHER]),
    ],
)  # fmt: skip
def test_an_epoch_that_is_evaluated_again_takes_its_place(tmp_path, there, new, resumed, left):
    for one in there:
        results.append(tmp_path, [one])
    results.append(tmp_path, [new], resumed)
    assert results.read(tmp_path) == left


def append_slowly(folder, name):
    """So that one reads while another is between reading and writing."""
    read = results.read

    def slow(path):
        found = read(path)
        time.sleep(0.02)
        return found

    results.read = slow
    for _ in range(20):
        results.append(folder, [OTHER | {"by": name}])


@pytest.mark.slow  # two processes start
def test_processes_lose_nothing_of_each_other(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    both = [spawn.Process(target=append_slowly, args=(tmp_path, name)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    by = [found["by"] for found in results.read(tmp_path)]
    assert (by.count("a"), by.count("b")) == (20, 20)


def test_counts_add_up():
    videos = tuple(Video(str(n), f"{n}.mp4") for n in range(5))
    split = Split("val", videos, tuple((n, "a") for n in (0, 0, 1, 2, 3, 4)), ("x.mp4", "y.mp4"), 7)
    counts = results.count(split, 4, 4)
    assert counts["videos"] == {"listed": 7, "missing": 2, "unreadable": 1, "evaluated": 4}
    assert counts["captions"] == {
        "listed": 13, "of missing videos": 7, "of unreadable videos": 2, "evaluated": 4
    }  # fmt: skip
    for found in counts.values():
        assert sum(found.values()) == 2 * found["listed"]


def opened(path, alone=True) -> state.Folder:
    folder = state.Folder(str(path))
    folder.open(alone)
    return folder


@pytest.fixture(autouse=True)
def logged_nowhere():
    yield
    terminal.stop_logging()


@pytest.mark.parametrize("alone", [True, False])
def test_a_refused_call_leaves_what_was_there(tmp_path, alone):
    opened(tmp_path / "new/deep", alone).close(refused=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    opened(tmp_path / "own", alone).close(refused=True)
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["notes.txt"]
    opened(tmp_path / "kept").close()
    opened(tmp_path / "kept", alone).close(refused=True)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {".lock", "log.txt"}, "of a call before it"


def test_a_refused_call_takes_nothing_from_one_that_runs(tmp_path):
    """An evaluation makes the folder; a training begins in it; then the evaluation is refused."""
    evaluation = opened(tmp_path / "out", alone=False)
    running = opened(tmp_path / "out")
    evaluation.close(refused=True)
    with pytest.raises(UsageError, match="in use by another"):
        lock.hold(tmp_path / "out")
    assert (tmp_path / "out/log.txt").exists()
    running.close()


def test_a_damaged_history_is_found_before_the_work(tmp_path, capsys):
    (tmp_path / results.NAME).write_text("{}")
    said = refused(capsys, "--output_dir", str(tmp_path), "--datatype", "synthetic", "--synthetic_train", "2000")
    assert f"{tmp_path / results.NAME} has no sha256" in said
    assert "move it away" in said
    assert [path.name for path in tmp_path.iterdir()] == [results.NAME]
