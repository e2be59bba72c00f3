# SPDX-License-Identifier: Apache-2.0
"""A plugin of pytest: which tests run, in which of several processes, and which of them with nothing beside them.

tests/conftest.py takes its hooks; docs/dev/testing.md says what the lanes are for.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
import zlib
from pathlib import Path

import pytest

# The tests of a file share a process, where they share what they set up, but for those of these long files.
SPREAD = tuple(
    f"tests/{name}.py" for name in (
        "ops/test_attention", "ops/test_gpu", "ops/test_library", "ops/test_merge", "ops/test_merge_norm",
        "ops/test_triton", "vit/test_every_model",
    )
)  # fmt: skip
# Few tests that take long: begun last, they would leave the other processes idle.
FIRST = tuple(
    f"tests/{name}.py" for name in (
        "retrieval/test_accuracy", "bench/test_gpu_suite", "retrieval/test_run", "build/test_aot", "bench/test_stop",
        "bench/test_launches", "vit/test_situations", "vit/test_parallel", "build/test_packaging",
    )
)  # fmt: skip


def pytest_addoption(parser):
    parser.addoption(
        "--share", type=share, metavar="K/N",
        help="of the tests marked full, run the K-th of N shares, counted from 0 (with -m '')",
    )  # fmt: skip


def share(text: str) -> tuple[int, int]:
    """Return K and N of ``K/N``."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise pytest.UsageError(f"--share={text} is not K/N with 0 <= K < N")
    return int(part), int(parts)


def in_share(nodeid: str, part: int, parts: int) -> bool:
    """Return whether a test is of the share ``part``: the same on every machine."""
    return zlib.crc32(nodeid.encode()) % parts == part


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("interpreted") and "triton" in item.nodeid.partition("[")[2]:
            item.add_marker(pytest.mark.slow)
    if chosen := config.getoption("--share"):
        rest = {item for item in items if item.get_closest_marker("full") and not in_share(item.nodeid, *chosen)}
        config.hook.pytest_deselected(items=[*rest])
        items[:] = [item for item in items if item not in rest]
    if hasattr(config, "workerinput"):
        order = {name: place for place, name in enumerate(FIRST)}
        items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send files to processes, in the order above, where nothing else is asked for.

    xdist's own groups (``--dist loadgroup``, version 3.8) do nothing under pytest 9.2.
    """
    if config.getoption("dist") != "load" or config.getoption("maxschedchunk"):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def scope(nodeid: str) -> str:
    """Return the name that tests of one process share."""
    file = nodeid.partition("::")[0]
    return nodeid if file in SPREAD else file


def pytest_collection_finish(session):
    set_aside()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if item.get_closest_marker("compiled"):
        set_aside()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    gc.unfreeze()  # Triton's bindings list what is not freed at the end


def set_aside():
    """Take what is alive out of the garbage collector's sight: it, and apply_tome_patch, look at all objects often.

    Half a million come with the imports, and torch's compiler keeps thousands of each graph for ever.
    """
    gc.collect()
    gc.freeze()


LOCKS = pytest.StashKey[tempfile.TemporaryDirectory]()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tell each of xdist's processes the folder of this run's locks."""
    if LOCKS not in node.config.stash:
        node.config.stash[LOCKS] = folder = tempfile.TemporaryDirectory(prefix="pytest-locks-")
        node.config.add_cleanup(folder.cleanup)
    node.workerinput["locks"] = node.config.stash[LOCKS].name


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run a test that is marked alone with no other beside it, under ``pytest -n`` too."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder = Path(item.config.workerinput["locks"])
    with open(folder / "queue", "w") as queue, open(folder / "running", "w") as running:
        fcntl.flock(queue, fcntl.LOCK_EX)  # kept by whoever waits to be alone, so that no other test begins
        fcntl.flock(running, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(running, fcntl.LOCK_UN)  # also for a process that the test has left behind
