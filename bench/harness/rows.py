# SPDX-License-Identifier: Apache-2.0
"""The rows of results: the machine in each of them, the percentiles, and the file that they are kept in."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import no_gpu
from .measure import percentile

ROOT = Path(__file__).resolve().parents[2]

# -- the machine ------------------------------------------------------------------------------------------------------


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str, commit: str | None) -> dict:
    """Return the part of a row that says where and on what it was measured; a dry run's device is ``none``."""
    gpu = device == "cuda"
    # who names the commit vouches for the checkout, which may lie on another one, or hold a prepared cache
    changed = None if commit else _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu_model(),
        "device_kind": "none" if no_gpu.pretending() else device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "package": version_of("stoptome_kernels"),
        "commit": commit or _output("git", "rev-parse", "--verify", "-q", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def slug(row: dict) -> str:
    """Return a file name for the rows of a machine, such as ``amd-epyc-2-threads-torch2.13``."""
    threads = f" {row['threads']} threads" if row["device_kind"] == "cpu" else ""
    release = ".".join(row["torch"].split(".")[:2])
    return re.sub(r"[^a-z0-9.]+", "-", f"{row['device']}{threads} torch{release}".lower()).strip("-")


# -- the file of rows -------------------------------------------------------------------------------------------------


def percentiles(samples: list[float], digits: int = 3) -> dict[str, float | int | None]:
    """Return the columns of a time in µs: percentiles, and of how many samples; None where there are none."""
    columns = {f"p{k}_us": round(percentile(samples, k / 100), digits) if samples else None for k in (20, 50, 80)}
    return {**columns, "runs": len(samples)}


IDENTITY = ("device", "threads", "pages", "torch", "shape", "n", "dtype", "op", "direction", "impl")
WHOLE = "all of it"  # the part of a call that its other parts add up to


def read_rows(file: Path, keys: Iterable[str] = IDENTITY) -> list[dict]:
    """Return the rows of a results file, which have these keys; raise ValueError if it is none."""
    rows = json.loads(file.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
        raise ValueError(f"{file} is not a list of benchmark rows")
    return rows


def rows_file(asked: Path | None, where: dict, suffix: str = "") -> Path | None:
    """Return the file that ``--json`` names, in a folder the one of this machine; ValueError if something else is in
    it."""
    if asked and (asked.is_dir() or not asked.suffix):
        asked = asked / f"{slug(where)}{suffix}.json"
    if asked and asked.exists():
        try:
            read_rows(asked)
        except ValueError as error:
            raise ValueError(f"--json: {error}; name another file") from None
    return asked


def write_rows(file: Path, rows: list[dict]) -> None:
    """Add rows to a file, in place of older ones of the same measurement; all or nothing, whenever it is stopped."""
    kept = {_identity(row): row for row in (read_rows(file) if file.exists() else [])}
    kept.update({_identity(row): row for row in rows})
    save_rows(file, kept.values())


def _identity(row: dict) -> tuple:
    """Return what tells a row apart; a row of a part of a call names the part, too."""
    return (*(row[key] for key in IDENTITY), row.get("part"))


def save_rows(file: Path, rows: Iterable[dict]) -> None:
    """Write a file of rows, all or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    os.replace(part, file)
