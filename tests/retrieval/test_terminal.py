# SPDX-License-Identifier: Apache-2.0
"""What is printed and logged, full disks, the lock on a run's folder, and the environment."""

import contextlib
import errno
import logging
import os
import signal
import subprocess
import sys

import filelock
import pytest
import torch

from retrieval import curves, lock, run, state, terminal
from retrieval.errors import UsageError
from retrieval.parallel import Processes
from support.retrieval import refused

READABLE = [
    "", "plain.mp4", "a b\u00a0c", "ü 日本語 العربية עברית ไทย हिन्दी", "👍🏽 👨\u200d👩\u200d👧 🇫🇷",
    "می\u200cخواهم", "क्\u200dष", "back\\slash", "\u0600123", "x\u0301", "−×Σ",
]  # fmt: skip
OBEYED = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m", "\x1b]0;title\x07": r"\x1b]0;title\x07", "a\nb\r\tc": r"a\nb\r\tc",
    "\x9b31m": r"\x9b31m", "\x7f\x00\x85": r"\x7f\x00\x85", "a\u202eb\u2066c\u200f": r"a\u202eb\u2066c\u200f",
    "a\u2028b\u2029": r"a\u2028b\u2029", "\udcff.mp4": r"\udcff.mp4", "a\u200bb\ufeff\u00ad": r"a\u200bb\ufeff\xad",
    "a\u200db\u200c": r"a\u200db\u200c", "\U000e0041": r"\U000e0041",
}  # fmt: skip


@pytest.mark.parametrize("text", READABLE)
def test_what_people_write_stays_as_it_is(text):
    assert terminal.escape(text) == text


@pytest.mark.parametrize("text", OBEYED)
def test_what_a_terminal_obeys_or_hides_is_shown(text):
    assert terminal.escape(text) == OBEYED[text]
    assert terminal.escape(f"日本 {text}") == f"日本 {OBEYED[text]}"


@pytest.fixture
def logged():
    yield terminal.log
    for handler in terminal.log.handlers[:]:
        terminal.log.removeHandler(handler)
        handler.close()


def test_logs_are_escaped(tmp_path, logged, capsys):
    terminal.log_to_terminal("process 1: ")
    terminal.log_to_file(tmp_path / "log.txt")
    logged.warning("skipped %s: %s", "日\x1b[2J\n.mp4", "x\u202e")  # no surrogates: pytest-xdist can't send them
    assert capsys.readouterr().out == "process 1: skipped 日\\x1b[2J\\n.mp4: x\\u202e\n"
    (line,) = (tmp_path / "log.txt").read_text("utf-8").splitlines()
    assert line.endswith("skipped 日\\x1b[2J\\n.mp4: x\\u202e")
    record = logging.makeLogRecord({"msg": "\udcff"})
    shown = ascii(logged.handlers[-1].format(record))
    assert shown.endswith(r"\\udcff'")


def test_errors_are_escaped(capsys, tmp_path):
    name = "x\x1b]0;t\x07\u202e\n\udcff"
    for more in (["--init_model", name, "--do_eval"], [f"--{name}"], ["--lr", name], ["--datatype", name]):
        said = refused(capsys, "--output_dir", str(tmp_path), *more)
        assert r"\x1b]0;t\x07\u202e\n" in said or r"\\x1b]0;t" in said or r"\x1b]0;t" in said
        assert said.isprintable()


@pytest.mark.slow
@pytest.mark.parametrize(("utf8", "shown"), [("0", rb"\ud"), ("1", rb"\u65e5")])
def test_a_terminal_that_lacks_the_letters(tmp_path, utf8, shown):
    """Python's mode of UTF-8 reads the name as letters, and without it as bytes that are none."""
    code = (
        "import sys; from retrieval import run, terminal\ncode = run.main(sys.argv[1:])\nterminal.say(sys.argv[-1])\n"
    )
    env = os.environ | {
        "PYTHONIOENCODING": "ascii:strict",
        "LC_ALL": "C",
        "PYTHONUTF8": utf8,
        "PYTHONCOERCECLOCALE": "0",
    }
    argv = ["--output_dir", str(tmp_path), "--do_eval", "--init_model", os.fsdecode("日本".encode() + b"\xff")]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(code)", *argv], capture_output=True,
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: no checkpoint at " + shown)
    assert done.stdout.startswith(shown)


# -- full disks -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_after(size: int):
    """No file may have more bytes, as if the disk were full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("size", [0, 3000, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, best, size):
    folder = state.Folder(str(tmp_path))
    folder.save({"weights": torch.zeros(50_000)}, best=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with full_after(size), pytest.raises(UsageError, match=r"ckpt\S*\.pth\.tar can't be written: File too large"):
        folder.save({"weights": torch.ones(50_000)}, best)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_error_of_saving_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="no such number"):
        state.Folder(str(tmp_path)).save({"weights": Unwilling()}, best=False)
    assert list(tmp_path.iterdir()) == []


class Unwilling:
    def __reduce__(self):
        raise RuntimeError("no such number")


def test_curves_on_a_full_disk(tmp_path):
    written = curves.Curves(tmp_path)
    written.add("loss", 1.0, 1)
    with full_after(100), pytest.raises(UsageError, match="can't be written: File too large"):
        written.add("loss" * 100, 1.0, 2)
    written.close()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file can't be written"):
        curves.Curves(tmp_path / "file")


def test_curves_are_those_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    written = curves.Curves(tmp_path, first=3)
    written.add("train/loss", 0.5, 7)
    written.close()
    (path,) = tmp_path.glob("events.out.tfevents.*")
    version, purge, event = EventFileLoader(str(path)).Load()
    assert version.file_version == "brain.Event:2"
    assert (purge.step, purge.session_log.status) == (3, 1)
    assert (event.step, event.summary.value[0].tag) == (7, "train/loss")


def test_a_log_on_a_full_disk(tmp_path, logged):
    terminal.log_to_file(tmp_path / "log.txt")
    logged.warning("x")
    with full_after(10), pytest.raises(UsageError, match=r"log\.txt can't be written: File too large"):
        logged.warning("y" * 9000)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"folder can't be written: Is a directory"):
        terminal.log_to_file(tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_that_can_not_be_written(tmp_path):
    code = "import sys; from retrieval.run import main; sys.exit(main(sys.argv[1:]))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    few = ["--synthetic_train", "2", "--synthetic_val", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "--output_dir", str(tmp_path), *few],
            stdout=full,
            stderr=subprocess.PIPE,
            env=env,
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(b"error: standard output can't be written: No space left")
    assert len(done.stderr.splitlines()) == 1


# -- one at a time ----------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from retrieval import state
folder = state.Folder(sys.argv[1])
folder.open(alone=True)
if sys.argv[2:]:  # as a process that decodes videos, which outlives a killed training by some seconds
    import os
    if not (child := os.fork()):
        time.sleep(60)
    print(child, flush=True)
print("held", flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def holder(folder, *more):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, env=env, text=True
    )
    try:
        assert process.stdout is not None
        process.child = int(process.stdout.readline()) if more else 0
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        if getattr(process, "child", 0):
            os.kill(process.child, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path, capsys):
    with holder(tmp_path) as process:
        before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        for argv in (["--do_train", "1"], ["--resume", "auto"], ["--index"], ["--do_train", "1", "--index"]):
            said = refused(capsys, "--output_dir", str(tmp_path), *argv)
            assert f"--output_dir {tmp_path} is in use by another training" in said
        assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        folder = state.Folder(str(tmp_path))
        folder.open(alone=True)
        folder.close()


def test_a_run_gives_its_folder_back_however_it_ends(tmp_path, capsys):
    for _ in range(2):
        said = refused(capsys, "--output_dir", str(tmp_path), "--do_train", "1", "--init_model", "nowhere")
        assert "nowhere" in said
    held = lock.hold(tmp_path)
    assert held is not None
    held.release()


@pytest.mark.slow
def test_what_a_killed_training_has_forked_holds_no_lock(tmp_path):
    with holder(tmp_path, "forking") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(process.child, 0)  # it lives
        held = lock.hold(tmp_path)
        assert held is not None
        held.release()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EOPNOTSUPP, "Operation not supported"),
        OSError(errno.ENOLCK, "No locks available"),
        NotImplementedError("no flock"),
    ],
)
def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, logged, capsys, error):
    def fail(self, *_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    terminal.log_to_terminal()
    folder = state.Folder(str(tmp_path))
    folder.open(alone=True)
    folder.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert f"{tmp_path} can't be locked" in said[0]


@pytest.mark.parametrize("kind", ["a folder", "a link to nowhere", "EACCES", "EIO"])
def test_a_lock_that_can_not_be_had_is_no_licence(tmp_path, monkeypatch, capsys, kind):
    """Who holds it can't be known."""
    if kind == "a folder":
        (tmp_path / lock.NAME).mkdir()
    elif kind == "a link to nowhere":
        (tmp_path / lock.NAME).symlink_to(tmp_path / "nowhere" / "lock")
    else:
        number = getattr(errno, kind)

        def fail(self, *_, **__):
            raise OSError(number, os.strerror(number))  # as PermissionError, for one

        monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    said = refused(capsys, "--output_dir", str(tmp_path), "--do_train", "1")
    assert f"{tmp_path / lock.NAME} can't be locked: " in said
    assert "give another --output_dir" in said


# -- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("WORLD_SIZE", ("abc", "0", "-1", "", "1.5", "9" * 5000, "²", "\x1b[31m")),
        ("RANK", ("abc", "-1", "1", "7", "", "0x0")),
        ("LOCAL_RANK", ("abc", "-1", "")),
    ],
)
def test_an_environment_that_is_not_torchruns(tmp_path, monkeypatch, capsys, name, values):
    for value in values:
        monkeypatch.setenv(name, value)
        said = refused(capsys, "--output_dir", str(tmp_path / "out"))
        assert f"the environment variable {name} must be an integer from" in said
        assert "torchrun" in said
        assert len(said) < 300
        assert said.isprintable()
    assert not (tmp_path / "out").exists()


def test_processes_that_can_not_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"the 2 processes can't meet .*MASTER_"):
        Processes()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "abc")
    with pytest.raises(UsageError, match=r"the 2 processes can't meet "):
        Processes()


@pytest.mark.parametrize("value", ["nonsense", "triton"])
def test_a_backend_that_there_is_not(tmp_path, monkeypatch, capsys, value):
    if value == "triton" and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
        pytest.skip("Triton can run here")
    monkeypatch.setenv("STOPTOME_BACKEND", value)
    assert "STOPTOME_BACKEND" in refused(capsys, "--output_dir", str(tmp_path))
    assert not (tmp_path / "synthetic").exists()


def test_the_program_leaves_no_handlers(tmp_path, capsys):
    before = logging.getLogger("stop_retrieval").handlers[:]
    refused(capsys, "--output_dir", str(tmp_path), "--init_model", "nowhere")
    assert logging.getLogger("stop_retrieval").handlers == before
    assert run.log is terminal.log
