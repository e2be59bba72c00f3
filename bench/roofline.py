#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Predict the time of a block's launches on a GPU, and what merging gains: a model, no measurement.

    python bench/roofline.py                                      # tables: residuals, attention, speed-ups
    python bench/roofline.py --json bench/results/roofline/predictions.json
    python bench/roofline.py --against rows.json fused.json tune.json   # beside what was measured

Needs no GPU. Bytes and products follow from shapes; registers and instructions are counted in compiled kernels, and are
read from bench/results/roofline/kernels.json. After a kernel or its configuration has changed, count them again, with
the Triton that GPUs have:

    PYTHONPATH=.triton-3.6 python bench/roofline.py --compile --json bench/results/roofline/predictions.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from harness import cli
from harness.block_model import BATCHES, STACKS, Forecast, Stack, forecast, patched, unpatched
from harness.kernel_work import Counted, Launch, NotCounted, Sizes, attend_work, merge_work, read_counted
from harness.measurements import Measured, error_of, from_columns, measurements, profiled
from harness.roofline import DEVICES, Device, Work, bound, flash, time_us
from harness.rows import ROOT, read_rows, save_rows

RESULTS = ROOT / "bench" / "results"
KERNELS = RESULTS / "roofline" / "kernels.json"  # counted
MEASURED = RESULTS / "roofline" / "measured.json"  # launches of our kernels that an H200 ran, as they were then
TORCHS = RESULTS / "fused" / "nvidia-h200-torch2.11.json"  # torch's own
ATTENTION = (  # STOP B/32 with prompts, ViT-B/16, ViT-H/14, ViT-L/16 @384, VideoMAE-B, images of 64 × 64 tokens
    Sizes(1536, 54, 768, 12, 5, 2, prefix=4, share=12), Sizes(256, 197, 768, 12, 1, 0), Sizes(64, 257, 1280, 16, 1, 0),
    Sizes(64, 577, 1024, 16, 1, 0), Sizes(16, 1568, 768, 12, 0, 0), Sizes(8, 4096, 1024, 16, 0, 0),
    Sizes(8, 4096, 1024, 8, 0, 0),
)  # fmt: skip
PLAIN = ("add + layer_norm", "sdpa, no sizes")  # sides of fused.py that are torch's alone
LAUNCHES_AT = 256  # batch whose launches become rows


def count(launch: Launch, through_loops: bool) -> dict:
    """Compile a launch for sm_90; return its registers, what a multiprocessor holds of it, and its instructions."""
    import aot_report
    from harness import sass

    try:
        row = aot_report.compile_one(launch, 90)
        code = aot_report.dump(aot_report.build(launch, 90).asm["cubin"], "--dump-sass")
    except Exception as error:  # whatever the compiler or its tools say: other rows are still of interest
        raise NotCounted(f"{launch[0].__name__}: {error}") from error
    resources = {"triton": aot_report.triton.__version__, "registers": row["registers"], "spill": row["spill"]}
    return {**resources, "shared": row["shared"], "resident": row["blocks"], **sass.executed(code, through_loops)}


# -- predictions ------------------------------------------------------------------------------------------------------


def launch_row(work: Work, device: Device) -> dict:
    """Return the columns of a launch."""
    return {
        "launch": work.name, "predicted_us": round(time_us(work, device), 2), "bound": bound(work, device),
        "bytes": int(work.nbytes), "flops": int(work.flops), "programs": work.programs, "warps": work.warps,
        "resident": work.resident, "rounds": work.rounds, "instructions": work.instructions,
    }  # fmt: skip


def launch_rows(stack: Stack, device: Device, counted: Counted) -> list[dict]:
    """Return the launches of the first block, patched and not; and a merge by itself."""
    s = stack.sizes(LAUNCHES_AT, stack.tokens, stack.r)
    sides = {"patched": patched(s, device, counted), "unpatched": unpatched(s, device), "none": merge_work(s, counted)}
    leading = {"kind": "launch", "device": device.name, "shape": stack.name, "n": s.n, "tokens": s.tokens}
    return [{**leading, "block": side, **launch_row(work, device)} for side, found in sides.items() for work in found]


def attention_row(s: Sizes, device: Device, counted: Counted) -> dict:
    """Return attention with sizes beside attention without."""
    (ours,) = attend_work(s, counted)
    plain = flash(s.n, s.heads, s.tokens, s.tokens + s.prefix, s.channels, device)
    us, plain_us = time_us(ours, device), time_us(plain, device)
    columns = launch_row(ours, device)
    del columns["launch"]
    return {
        "kind": "attention", "device": device.name, "n": s.n, "heads": s.heads, "queries": s.tokens,
        "keys": s.tokens + s.prefix, "channels": s.channels, **columns,
        "flash_us": round(plain_us, 2), "times_flash": round(us / plain_us, 3),
    }  # fmt: skip


def eta_row(stack: Stack, batch: int, device: Device, found: Forecast) -> dict:
    """Return the speed-up of a stack."""
    return {
        "kind": "eta", "device": device.name, "shape": stack.name, "batch": batch,
        "unpatched_us": round(found.unpatched_us, 1), "predicted_us": round(found.patched_us, 1),
        "attention_us": round(found.attention_us, 1), "merging_us": round(found.merging_us, 1),
        "speedup": round(found.speedup, 4), "ideal": round(found.ideal, 4), "eta": round(found.eta, 4),
        "eta_at_flash": round(found.eta_at_flash, 4),
    }  # fmt: skip


def predictions(devices: Iterable[Device], counted: Counted) -> list[dict]:
    """Return all rows."""
    rows = []
    for device in devices:
        for stack in STACKS:
            rows += launch_rows(stack, device, counted)
        rows += [attention_row(s, device, counted) for s in ATTENTION]
        for stack in STACKS:
            rows += [eta_row(stack, n, device, forecast(stack, n, device, counted)) for n in BATCHES]
    return rows


# -- tables -----------------------------------------------------------------------------------------------------------


def eta_table(rows: list[dict]) -> str:
    """Return a line for each stack: η at each batch, and with attention as fast as without sizes."""
    found: dict[tuple, dict[int, dict]] = {}
    for row in rows:
        if row["kind"] == "eta":
            found.setdefault((row["device"], row["shape"]), {})[row["batch"]] = row
    batches = "".join(f" {f'at {n}':>6}" for n in BATCHES)
    head = f"{'device':6} {'η of':20}{batches}  attention as flash:{batches} {'ideal':>6}"
    lines = [f"{head}  at {BATCHES[-1]}: attention, match + merge_norm less add + LayerNorm"]
    for (device, shape), at in found.items():
        last = at[BATCHES[-1]]
        etas, flashes = ("".join(f" {at[n][name]:6.3f}" for n in BATCHES) for name in ("eta", "eta_at_flash"))
        shares = ", ".join(f"{last[part] / last['predicted_us']:.1%}" for part in ("attention_us", "merging_us"))
        lines.append(f"{device:6} {shape:20}{etas}  {'':19}{flashes} {last['ideal']:6.3f}  {shares}")
    return "\n".join(lines)


def attention_table(rows: list[dict]) -> str:
    """Return a line for each number of keys and width of a head."""
    head = f"{'device':6} {'N × heads':>11} {'keys':>5} {'width':>5} {'µs':>8} {'flash µs':>8} {'ours ÷ flash':>12}"
    lines = [f"{head}  bound by"]
    for r in rows:
        if r["kind"] == "attention":
            shape, us = f"{r['n']} × {r['heads']}", f"{r['predicted_us']:8.1f} {r['flash_us']:8.1f}"
            keys = f"{r['keys']:5} {r['channels']:5}"
            lines.append(f"{r['device']:6} {shape:>11} {keys} {us} {r['times_flash']:12.2f}  {r['bound']}")
    return "\n".join(lines)


def launch_table(rows: list[dict]) -> str:
    """Return a line for each launch of the first block, patched and not."""
    lines = [f"{'device':6} {'stack':20} {'block':9} {'launch':16} {'µs':>8} {'MB':>7} {'GFLOP':>7}  bound by"]
    for r in rows:
        if r["kind"] == "launch":
            lines.append(
                f"{r['device']:6} {r['shape']:20} {r['block']:9} {r['launch']:16} {r['predicted_us']:8.1f} "
                f"{r['bytes'] / 1e6:7.1f} {r['flops'] / 1e9:7.1f}  {r['bound']}"
            )
    return "\n".join(lines)


def residual_table(found: list[Measured]) -> str:
    """Return a line for each measurement, the model beside it; then by how much it is off."""
    lines = [f"{'op':11} {'shape':17} {'n':>5} {'µs':>8} {'model':>8} {'ratio':>5}  bound by, measured, impl"]
    for m in found:
        by = "/".join(dict.fromkeys(bound(work, DEVICES[m.device]) for work in m.works))
        lines.append(
            f"{m.op:11} {m.shape:17} {m.n:5} {m.measured_us:8.1f} {m.modelled_us:8.1f} {m.ratio:5.2f}  "
            f"{by}, {m.how}, {m.impl}"
        )
    for op in dict.fromkeys(m.op for m in found):
        own = [m for m in found if m.op == op]
        least, most = min(m.ratio for m in own), max(m.ratio for m in own)
        lines.append(f"{op}: {len(own)} measurements, model ÷ measured {least:.2f} to {most:.2f}, "
                     f"off by a factor of {error_of(own):.2f} in the mean")  # fmt: skip
    return "\n".join(lines)


def residuals() -> list[Measured]:
    """Return all committed measurements of an H200: of our kernels as they were, and of torch's."""
    ours = [from_columns(row) for row in json.loads(MEASURED.read_text())]
    return ours + profiled() + [*measurements([r for r in read_rows(TORCHS) if r["impl"] in PLAIN], Counted())]


# -- main -------------------------------------------------------------------------------------------------------------


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = cli.bare_parser(__doc__)
    add = p.add_argument
    add("--device", nargs="+", choices=DEVICES, default=list(DEVICES))
    add("--json", type=Path, metavar="FILE", help="write the predictions, or what was measured, to FILE")
    add("--compile", action="store_true", help=f"count kernels that {KERNELS.name} lacks, and write it")
    add(
        "--against",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="rows of merge.py, fused.py, attention.py, tune.py to compare with",
    )
    add("--variants", action="store_true", help="with --against: all configurations of tune.py, not the defaults alone")
    add("--launches", action="store_true", help="also print the launches of each stack's first block")
    return p.parse_args(argv)


def against(files: list[Path], counted: Counted, every_variant: bool) -> list[Measured]:
    """Return what the model can be held against, of all rows in the files that are there."""
    rows = []
    for file in files:
        try:
            rows += read_rows(file)
        except (OSError, ValueError) as error:
            print(f"left out: {error}")
    return [*measurements(rows, counted, every_variant)]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    counted = read_counted(KERNELS, count if args.compile or args.against else None)
    if args.against:
        found = against(args.against, counted, args.variants)
        print(residual_table(found) if found else "nothing there that the model describes")
        if args.json:
            save_rows(args.json, [m.columns() for m in found])
        return 0
    try:
        rows = predictions([DEVICES[name] for name in args.device], counted)
    except NotCounted as error:
        said = f"{KERNELS.name} does not have this kernel: {error}"
        print(f"error: {said}; see the end of python bench/roofline.py --help", file=sys.stderr)
        return 1
    if args.compile:
        save_rows(KERNELS, (counted.rows[name] for name in sorted(counted.used)))
    tables = [residual_table(residuals()), attention_table(rows), eta_table(rows)]
    print("\n\n".join([*([launch_table(rows)] if args.launches else []), *tables]))
    if args.json:
        save_rows(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
