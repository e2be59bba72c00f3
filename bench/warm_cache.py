#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compile what the GPU suite will need on a machine without a GPU, with the GPU machine's Triton and Python.

    python bench/warm_cache.py make FILE.tar.gz           # compile for sm_90 and pack
    python bench/warm_cache.py use FILE.tar.gz FOLDER     # on the GPU machine: unpack, if its Triton is the same
    PYTHONPATH=bench TRITON_CACHE_DIR=FOLDER TRITON_CACHE_MANAGER=harness.cache_marks:MarkingCache ...  # what is to run
    python bench/warm_cache.py used FILE.tar.gz FOLDER    # how many were used, and what was compiled besides

Triton's key of a kernel is made of Triton's own files, the kernel's source, constants, options and ptxas; a kernel that
is not found is compiled as ever. The launchers that Triton has a C compiler make before 3.7 belong to the machine's
driver and are not packed. `use` ends with status 3 if the pack is for another Triton, which it names.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import gpu_suite

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 40 << 20  # of a pack
KEY = "key.json"
MEMBER = re.compile(r"[A-Z2-7]{40,60}/[\w.-]+")  # an entry of Triton's cache and a file of it
GROUP = "__grp__"
MUST_FIT = ("triton", "triton_key", "ptxas", "environment")


def key() -> dict:
    """Return what must be the same on both machines, and by what a person tells packs apart."""
    import triton
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    try:
        from triton.runtime.cache import triton_key
    except ImportError:  # before Triton 3.5
        from triton.compiler.compiler import triton_key
    sources = sorted((ROOT / "stoptome_kernels" / "_backends" / "triton").glob("*.py"))
    return {
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(triton_key().encode()).hexdigest(),
        "python": platform.python_version(),
        "ptxas": make_backend(GPUTarget("cuda", 90, 32)).hash().strip(),  # ends with the architecture
        "environment": dict(sorted(get_cache_invalidating_env_vars().items())),
        "sources": {source.name: hashlib.sha256(source.read_bytes()).hexdigest() for source in sources},
    }


# -- make -------------------------------------------------------------------------------------------------------------

_gpu = None  # of a process that compiles


def _start(results: bool, first: str) -> None:
    global _gpu
    import torch

    from harness import no_gpu

    torch.set_num_threads(1)
    _gpu = no_gpu.install(results=results)
    from stoptome_kernels._backends.triton import attention, merge

    _ = {"merge": merge.reduce_rows, "attention": attention.attend}[first].cache_key


def _work(job: str) -> tuple[str, float, str | None]:
    from harness import launch_paths

    begin, wrong = time.perf_counter(), None
    try:
        launch_paths.run(job, _gpu)
    except Exception as error:  # the others are still worth packing
        wrong = f"{type(error).__name__}: {error}"
    return job, time.perf_counter() - begin, wrong


def make(file: Path, only: list[str], processes: int) -> int:
    """Compile in ``processes`` and pack; 1 if a job failed or the pack is too large."""
    begin, failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        cache, site = Path(folder, "cache"), Path(folder, "site")
        os.environ.update(TRITON_CACHE_DIR=str(cache), TRITON_STORE_BINARY_ONLY="1")
        os.environ.pop("TRITON_CACHE_MANAGER", None)
        gpu_suite.copy_package(site)  # whether this Python has the package or not, and whichever
        sys.path.insert(0, str(site))
        from harness import launch_paths

        chosen = [job for job in launch_paths.jobs() if not only or any(job.startswith(text) for text in only)]
        # Triton hashes the constants of a function that a kernel calls only if it was hashed before: the first kernel
        # of a process that calls merge._narrowed has another key than later on. These two have both.
        for results, first in itertools.product((True, False), ("merge", "attention")):
            some = [job for job in chosen if (job.split()[0] in launch_paths.RESULTS) == results]
            if not some:
                continue
            with multiprocessing.get_context("spawn").Pool(min(processes, len(some)), _start, (results, first)) as pool:
                for job, seconds, wrong in pool.imap_unordered(_work, some):
                    failed += wrong is not None
                    print(f"{job}: {seconds:.1f} s{f', FAILED: {wrong}' if wrong else ''}", flush=True)
        found = pack(cache, file, key())
    seconds, size = time.perf_counter() - begin, file.stat().st_size
    print(f"{found} kernels in {seconds:.0f} s, {size / 2**20:.1f} MiB packed")
    if size > MOST_BYTES:
        print(f"error: more than {MOST_BYTES >> 20} MiB", file=sys.stderr)
    return int(failed > 0 or size > MOST_BYTES or not found)


def pack(folder: Path, file: Path, made_with: dict) -> int:
    """Pack a cache's kernels, without paths of this machine; return how many they are."""
    entries = sorted({path.parent for path in folder.glob(f"*/{GROUP}*.json")})
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    with tarfile.open(part, "w:gz") as tar:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))

        add(KEY, json.dumps({**made_with, "kernels": len(entries)}, indent=1).encode())
        for entry in entries:
            for path in sorted(entry.iterdir()):
                content = path.read_bytes()
                if path.name.startswith(GROUP):
                    names = json.loads(content)["child_paths"]
                    content = json.dumps({"child_paths": {name: name for name in names}}).encode()
                add(f"{entry.name}/{path.name}", content)
    os.replace(part, file)
    return len(entries)


# -- use --------------------------------------------------------------------------------------------------------------


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """The files of a pack; ValueError if it holds anything that ``pack`` doesn't write."""
    members = tar.getmembers()
    for member in members:
        if not member.isreg() or not (member.name == KEY or MEMBER.fullmatch(member.name)):
            raise ValueError(f"it holds {member.name!r}, which no pack has")
    if KEY not in {member.name for member in members}:
        raise ValueError(f"it has no {KEY}")
    return members


def read_key(tar: tarfile.TarFile) -> dict:
    content = tar.extractfile(KEY)
    assert content is not None
    return json.load(content)


def use(file: Path, folder: Path) -> int:
    """Unpack into ``folder`` if the pack is for this machine; 3, saying why, if it is not."""
    with tarfile.open(file) as tar:
        members = _members(tar)
        theirs, ours = read_key(tar), key()
        different = [name for name in MUST_FIT if theirs.get(name) != ours[name]]
        for name in different:
            print(f"{name} is {ours[name]!r}, the pack's {theirs.get(name)!r}")
        if other := other_gpu():
            print(other)
        if different or other:
            return 3
        folder.mkdir(parents=True, exist_ok=True)
        tar.extractall(folder, [member for member in members if member.name != KEY], filter="data")
    for path in folder.glob(f"*/{GROUP}*.json"):  # Triton wants whole paths in them
        names = json.loads(path.read_bytes())["child_paths"]
        path.write_text(json.dumps({"child_paths": {name: str(path.parent.absolute() / name) for name in names}}))
    changed = [name for name, digest in ours["sources"].items() if theirs["sources"].get(name) != digest]
    if changed:
        print(f"changed since it was made: {', '.join(changed)}: what is compiled otherwise now will not be found")
    print(f"{theirs['kernels']} kernels")
    return 0


def other_gpu() -> str | None:
    """Say what is wrong with this machine's GPU, if it has one."""
    try:
        import torch
    except ImportError:
        return None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        return "the GPU is sm_{}{}, the pack is for sm_90".format(*torch.cuda.get_device_capability())
    return None


# -- used -------------------------------------------------------------------------------------------------------------


def used(file: Path, folder: Path) -> int:
    """Say how many of the pack's kernels were read since ``use``, and what was compiled besides."""
    from harness.cache_marks import MARKS

    with tarfile.open(file) as tar:
        packed = {member.name.partition("/")[0] for member in _members(tar) if member.name != KEY}
    names, compiled, modules = {}, Counter(), 0
    for entry in folder.iterdir():
        groups = list(entry.glob(f"{GROUP}*.json"))
        if groups:
            names[entry.name] = groups[0].name.removeprefix(GROUP).removesuffix(".json")
            if entry.name not in packed:
                compiled[names[entry.name]] += 1
        modules += any(entry.glob("*.so"))
    read = {path.name for path in (folder / MARKS).iterdir()} & packed if (folder / MARKS).is_dir() else None
    if read is None:
        print(f"how many of the {len(packed)} kernels were used is not known: no run had {MARKS_HINT}")
    else:
        by_name = Counter(names[entry] for entry in read)
        print(f"{len(read)} of {len(packed)} kernels were used: {_listed(by_name)}")
    print(f"{compiled.total()} kernels were compiled besides: {_listed(compiled)}")
    print(f"{modules} launchers and other modules were made by the C compiler; they are in no pack")
    return 0


MARKS_HINT = "TRITON_CACHE_MANAGER=harness.cache_marks:MarkingCache"


def _listed(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(20)) or "none"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sub = p.add_subparsers(dest="what", required=True)
    making = sub.add_parser("make", help="compile for sm_90 and pack")
    making.add_argument("file", type=Path, metavar="FILE.tar.gz")
    making.add_argument("--only", action="append", default=[], metavar="JOB", help="jobs whose name begins so")
    making.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    for name, what in (("use", "unpack, if it fits"), ("used", "say how many kernels of it were used")):
        other = sub.add_parser(name, help=what)
        other.add_argument("file", type=Path, metavar="FILE.tar.gz")
        other.add_argument("folder", type=Path, metavar="FOLDER")
    args = p.parse_args(argv)
    try:
        if args.what == "make":
            return make(args.file, args.only, args.processes)
        return (use if args.what == "use" else used)(args.file, args.folder)
    except (OSError, ValueError, KeyError, tarfile.TarError) as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
