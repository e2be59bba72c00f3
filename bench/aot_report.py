# SPDX-License-Identifier: Apache-2.0
"""Compile every Triton kernel ahead of time and report registers, spills and shared memory; needs no GPU.

    python bench/aot_report.py                                  # all shapes, dtypes and architectures
    python bench/aot_report.py --arch 90 --dtype bf16 --shape stop-b32-train --json rows.json

The launches come from the launchers themselves, called with tensors on the meta device, so what is compiled is what
runs. A kernel that spills registers or wants more shared memory than the architecture has fails the run (exit 1), and
so does one that a table given with --check holds other numbers for. The committed tables are made by

    python bench/aot_report.py --table bench/results/aot/triton-3.9.md   # once with every Triton that has one
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)  # kernels that are interpreted can't be compiled

import torch
import triton
from stoptome_kernels._backends.triton import attention, attention_grad, config, conv, match, merge, norm
from stoptome_kernels.reference import AttentionInputs, Groups, MergedRows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from charts.common import markdown_table
from harness import cli
from harness.shapes import ATTENDED
from harness.shapes import COMPILED as SHAPES
from harness.workloads.fused import FRAMES, PREFIX

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEFAULT_ARCHITECTURES = (80, 90, 100)
# bytes a block may have (CUDA guide, table 27)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)  # other keys of a specialisation
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}


def launches(shape: str, dtype: torch.dtype) -> list[tuple[str, tuple]]:
    """Return what the shape runs, forward and backward, as (what, launch)."""
    if shape in ATTENDED:
        n, tokens, heads, channels = ATTENDED[shape]
        return _named("attention", _attention(n, tokens, tokens, heads, channels, 0, dtype, True))
    n, tokens, dim, heads, protected, r = SHAPES[shape]
    groups = tokens - r

    def meta(*sizes: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    x, y = meta(n, tokens, dim, dtype=dtype), meta(n, groups, dim, dtype=dtype)
    size, size_out = meta(n, tokens, dtype=torch.float32), meta(n, groups, dtype=torch.float32)
    plan = tuple(meta(n, count, dtype=torch.int32) for count in (tokens, tokens, groups + 1))
    sized, unsized = Groups(*plan[1:], size), Groups(*plan[1:])
    # keys as attention has them, (N, H, T, C) inside a packed (N, T, 3, H, C)
    packed = meta(n, tokens, 3, max(heads, 1), dim // max(heads, 1), dtype=dtype)
    metric = packed[:, :, 1].transpose(1, 2) if heads else x[:, None]

    found = [("match", launch) for launch in match.launches(metric, r, protected, plan)]
    # a quarter as destinations, the others as sources
    order, before = meta(tokens, dtype=torch.int32), meta((tokens - protected) // 4, dtype=torch.int32)
    steps = match.launches(metric, r, protected, plan, order, before)
    found += [("match sets", launch) for launch in steps]
    found += [
        ("merge mean", merge.reduce_launch(x, sized, y, size_out, "mean")),
        ("merge mean, no size", merge.reduce_launch(x, unsized, y, size_out, "mean")),
        ("merge sum", merge.reduce_launch(x, sized, y, size_out, "sum")),
        ("merge max", merge.reduce_launch(x, sized, y, size_out, "max")),
        ("grad of mean", merge.spread_launch(y, sized, x, "mean", None, None)),
        ("grad of mean, no size", merge.spread_launch(y, unsized, x, "mean", None, None)),
        ("grad of sum", merge.spread_launch(y, unsized, x, "sum", None, None)),
        ("grad of max", merge.spread_launch(y, unsized, x, "max", x, y)),
        ("unmerge", merge.spread_launch(y, unsized, x, "all", None, None)),
        ("grad of unmerge", merge.reduce_launch(x, unsized, y, size_out, "all")),
    ]
    row, full = meta(dim, dtype=torch.float32), meta(n, tokens, dim, dtype=torch.float32)
    outputs = (y, y, size_out, size_out, size_out)
    mixed = (meta(n, groups, dim, dtype=torch.float32), *outputs[1:])
    rows = MergedRows(y, size_out, size_out)
    found += [
        ("merge_norm", norm.norm_launch(x, x, sized, row, row, 1e-5, outputs)),
        ("merge_norm, plain", norm.norm_launch(x, x, unsized, None, None, 1e-5, outputs)),
        ("merge_norm, autocast", norm.norm_launch(full, x, sized, row, row, 1e-5, mixed)),
        ("grad of merge_norm", norm.norm_grad_launch(y, y, rows, sized, row, x, norm.norm_partial(y))),
        ("grad of merge_norm, x", norm.norm_grad_launch(y, y, rows, sized, row, x, None)),
        ("grad of merge_norm, n", norm.norm_grad_launch(y, None, rows, unsized, None, x, None)),
    ]
    return found + attention_launches(shape, dtype) + conv_launches(shape, dtype)


def conv_launches(shape: str, dtype: torch.dtype) -> list[tuple[str, tuple]]:
    """STOP's widest convolution over pixels and its gradients for one video: spectra are float32 whatever the model."""
    if shape != "stop-b32-video" or dtype != torch.float32:
        return []
    plane = 240 * 121
    x, y, filters = (torch.empty(*sizes, plane, 2, device="meta") for sizes in ((1, 9, 12), (1, 16, 12), (16, 9, 3)))
    mirrored = torch.empty(9, 16, 3, plane, 2, device="meta")
    return [
        ("fft_conv3d", conv.multiply_launch(x, filters, y, -1)),
        ("grad of fft_conv3d, x", conv.multiply_launch(y, mirrored, x, -1)),
        ("grad of fft_conv3d, w", conv.correlate_launch(x, y, filters, -1)),
    ]


def attention_launches(shape: str, dtype: torch.dtype) -> list[tuple[str, tuple]]:
    """Attention with sizes over all tokens; in STOP and TempMe with four prompts in front, one set for 12 items. In
    STOP the prompts, too, which look at all frames of a video."""
    n, tokens, dim, heads = SHAPES[shape][:4]
    if shape.startswith("sd"):
        return []  # its attention is not ours
    heads = heads or 12
    prompts = PREFIX if shape.startswith(("stop", "tempme")) else 0
    sized, bare = (_attention(n, tokens, tokens, heads, dim // heads, prompts, dtype, sizes) for sizes in (True, False))
    found = [*_named("attention", sized), *_named("attention, plain", bare)]
    if shape.startswith("stop"):
        over = _attention(n // FRAMES, prompts, FRAMES * tokens, heads, dim // heads, prompts, dtype, True)
        found += _named("attention, prompts", over)
    return found


def _attention(
    n: int, queries: int, tokens: int, heads: int, channels: int, prompts: int, dtype: torch.dtype, sizes: bool
) -> list[tuple]:
    """Return the launches of attention, forward and backward, with tensors laid out as a packed projection leaves
    them."""

    def rows(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, channels, dtype=dtype, device="meta")

    q = rows(n, queries, 3, heads)[:, :, 0].transpose(1, 2)
    k, v = (rows(n, tokens, 3, heads)[:, :, part].transpose(1, 2) for part in (1, 2))
    size, lse = (torch.empty(*shape, device="meta") for shape in ((n, tokens), (n, heads, queries)))
    ahead = sizes and prompts
    prefix = [rows(max(1, n // FRAMES), heads, prompts) if ahead else None for _ in range(2)]
    parts = [rows(n, heads, prompts, dtype=torch.float32) if ahead else None for _ in range(2)]
    inputs = AttentionInputs(q, k, v, size if sizes else None, *prefix, channels**-0.5)
    out, like = rows(n, queries, heads).transpose(1, 2), rows(n, tokens, heads).transpose(1, 2)
    backward = attention_grad.grad_launches(out, inputs, out, lse, (out, like, like, *parts))
    return [attention.attend_launch(inputs, out, lse), *backward]


def _named(what: str, launches: list[tuple]) -> list[tuple[str, tuple]]:
    forward, *backward = launches
    return [(what, forward), *((f"grad of {what}", launch) for launch in backward)]


def source(kernel, arguments: tuple, constants: dict) -> ASTSource:
    """The specialisation that a launch with such arguments compiles: divisibility by 16, and 1 as a constant."""
    signature, values, aligned_to_16 = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], values[parameter.name] = "constexpr", constants[parameter.name]
            continue
        value = arguments[index]
        if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], values[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            aligned_to_16.append(index)
    if OLD:
        from triton.backends.compiler import AttrsDescriptor

        signature = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        return ASTSource(kernel, signature, values, AttrsDescriptor.from_hints(dict.fromkeys(aligned_to_16, 16)))
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned_to_16}
    return ASTSource(kernel, signature, values, attributes)


def _tool(name: str) -> str:
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else name


def dump(cubin: bytes, what: str) -> str:
    """Return what cuobjdump says of a kernel, such as ``--dump-resource-usage`` or ``--dump-sass``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return subprocess.run([_tool("cuobjdump"), what, str(path)], check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes of stack and local memory: where spilled registers go."""
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", dump(cubin, "--dump-resource-usage")))
    return {"registers": int(usage["REG"]), "spill": int(usage["STACK"]) + int(usage["LOCAL"])}


def build(launch: tuple, arch: int) -> Any:
    """Return what Triton compiles for a launch and an architecture."""
    kernel, _, arguments, meta = launch
    names = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {name: value for name, value in meta.items() if name in names}
    options = {name: value for name, value in meta.items() if name not in names}
    return triton.compile(source(kernel, arguments, constants), target=GPUTarget("cuda", arch, 32), options=options)


def compile_one(launch: tuple, arch: int) -> dict:
    """Compile a launch for an architecture and measure the result."""
    kernel, grid, _, meta = launch
    built = build(launch, arch)
    ptx = built.asm["ptx"]
    row = {
        "kernel": kernel.__name__,
        "grid": grid[0],
        "warps": meta["num_warps"],
        **resources(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "loads128": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
        "stores128": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx)),
    }
    # blocks that fit a multiprocessor: by its 65536 registers (given out in 256 per warp), by 64 warps and 32 blocks,
    # and by its shared memory, which is what one block may have and 1 KiB, the part of each block that is reserved
    by_registers = 65536 // (-(-row["registers"] // 8) * 8 * 32 * row["warps"])
    by_shared = (SHARED_LIMIT[arch] + 1024) // (row["shared"] + 1024)
    row["blocks"] = min(by_registers, by_shared, 64 // row["warps"], 32)
    row["ok"] = row["spill"] == 0 and row["shared"] <= SHARED_LIMIT[arch]
    return row


_COLUMNS = ("grid × warps", "registers", "shared", "blocks")


def _cells(row: dict) -> tuple[str, ...]:
    """Return the cells of a kernel in one dtype, as in _COLUMNS."""
    spill = f" + {row['spill']} B spilled" if row["spill"] else ""
    return f"{row['grid']} × {row['warps']}", f"{row['registers']}{spill}", str(row["shared"]), str(row["blocks"])


def _markdown(rows: list[dict], leading: tuple[str, ...]) -> str:
    """Return a table: a line for each launch, named by these keys of a row, and columns for each dtype."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        lines.setdefault(tuple(str(row[key]) for key in leading), {})[row["dtype"]] = _cells(row)
    dtypes = [name for name in DTYPES if any(name in found for found in lines.values())]
    head = [*leading, *(f"{name} {column}" for name in dtypes for column in _COLUMNS)]
    nothing = ("",) * len(_COLUMNS)
    cells = [[*names, *(cell for d in dtypes for cell in found.get(d, nothing))] for names, found in lines.items()]
    return markdown_table(head, cells, len(leading))


_NAMES = ("shape", "what", "kernel")


def table(rows: list[dict]) -> str:
    """The rows as Markdown: sm_90 in full, of the others what spills or leaves a multiprocessor one block."""
    shapes = dict.fromkeys(row["shape"] for row in rows)
    text = [
        f"# Kernels compiled by Triton {triton.__version__}",
        "",
        "Written by `bench/aot_report.py --table`, without a GPU. Shared: bytes a block. Blocks: resident on a",
        "multiprocessor by registers, shared memory and threads. Shapes as (N, T, D, heads, protected, r); heads 0:",
        "the metric is x itself.",
        "",
        *(f"- {name}: {SHAPES[name]}" for name in shapes if name in SHAPES),
        "",
        "Attention alone, as (N, T, heads, channels of a head):",
        "",
        *(f"- {name}: {ATTENDED[name]}" for name in shapes if name in ATTENDED),
        "",
        "## sm_90",
        "",
        _markdown([row for row in rows if row["arch"] == 90], _NAMES),
    ]
    for arch in sorted({row["arch"] for row in rows} - {90}):
        notable = [row for row in rows if row["arch"] == arch and (row["blocks"] < 2 or not row["ok"])]
        text += ["", f"## sm_{arch}: one block a multiprocessor, or a spill", ""]
        text += [_markdown(notable, _NAMES) if notable else "None."]
    return "\n".join(text) + "\n"


def differences(rows: list[dict], text: str) -> list[str]:
    """Return the lines of sm_90 in which a table differs from the rows."""
    section = text.partition("## sm_90\n")[2].partition("\n## ")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    found = {}
    for line in lines:
        names, cells = tuple(line[: len(_NAMES)]), line[len(_NAMES) :]
        for start in range(0, len(cells), len(_COLUMNS)):
            dtype = head[len(_NAMES) + start].split()[0]
            found[(*names, dtype)] = tuple(cell.strip() for cell in cells[start : start + len(_COLUMNS)])
    wrong = []
    for row in rows:
        said = found.get((*(row[name] for name in _NAMES), row["dtype"]))
        if row["arch"] == 90 and said != _cells(row):
            wrong.append(f"{row['shape']}, {row['what']}, {row['kernel']}, {row['dtype']}: {said} is now {_cells(row)}")
    return wrong


def main() -> int:
    """Compile, print a table, return 1 if a kernel spills, asks for too much, or differs from a table."""
    parser = cli.bare_parser(__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=list(DEFAULT_ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, *ATTENDED], default=[*SHAPES, *ATTENDED])
    parser.add_argument("--what", nargs="+", default=[""], help="only launches whose name contains one of these")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--table", type=Path, help="write them to this file as Markdown")
    parser.add_argument("--check", type=Path, help="fail where this table of the same Triton says something else")
    options = parser.parse_args()

    rows = []
    print(f"Triton {triton.__version__}; spill and shared in bytes; blocks = resident per multiprocessor")
    print(f"{'sm':>3} {'dtype':5} {'shape':15} {'what':22} {'kernel':13} {'grid':>7} {'warps':>5}", end=" ")
    print(f"{'regs':>4} {'spill':>5} {'shared':>6} {'blocks':>6} {'ld128':>5} {'st128':>5}")
    for arch, dtype, shape in itertools.product(options.arch, options.dtype, options.shape):
        with patch.object(config, "capability", lambda device, arch=arch: arch // 10 * 10):
            found = launches(shape, DTYPES[dtype])
        for what, launch in found:
            if not any(part in what for part in options.what):
                continue
            row = {"arch": arch, "dtype": dtype, "shape": shape, "what": what, **compile_one(launch, arch)}
            rows.append(row)
            print(
                f"{arch:3} {dtype:5} {shape:15} {what:22} {row['kernel']:13} {row['grid']:7} {row['warps']:5} "
                f"{row['registers']:4} {row['spill']:5} {row['shared']:6} {row['blocks']:6} "
                f"{row['loads128']:5} {row['stores128']:5}{'' if row['ok'] else '  <-- FAILS'}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1) + "\n")
    if options.table:
        options.table.parent.mkdir(parents=True, exist_ok=True)
        options.table.write_text(table(rows))
    wrong = differences(rows, options.check.read_text()) if options.check else []
    for line in wrong:
        print(f"{options.check} is out of date: {line}")
    failed = sum(not row["ok"] for row in rows)
    print(f"{len(rows)} kernels, {failed} with spills or too much shared memory")
    return 1 if failed or wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
