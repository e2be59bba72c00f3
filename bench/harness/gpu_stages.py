# SPDX-License-Identifier: Apache-2.0
"""The stages of bench/gpu_suite.sh: what runs on a GPU, in which order, and for how many seconds at most."""

from __future__ import annotations

from dataclasses import dataclass

LIMITS = {  # seconds
    "first": 400, "second": 300, "small": 260, "tests": 540, "bench": 560, "models": 400, "all": 1260, "dry": 600,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """A command of the suite, with a name that is unique in a plan, and its box."""

    name: str
    seconds: int
    script: str  # a file of bench/, or ``pytest``
    arguments: tuple[str, ...] = ()  # ``{out}`` stands for the folder of the suite's files
    under: tuple[str, ...] = ()  # the words of a profiler or sanitizer that runs it; left out where there is none


FIVE = "stop-b32-train,vit-b16-r16,stop-b32-video-r2,tempme-b32-clip12,vit-l16-384"
THREE = "stop-b32-train,vit-b16-r16,stop-b32-video-r2"


def pytest(name: str, seconds: int, *arguments: str) -> Stage:
    """Return a stage of tests."""
    return Stage(name, seconds, "pytest", arguments)


def merge(name: str, seconds: int, *arguments: str) -> Stage:
    """Return a stage of bench/merge.py."""
    return Stage(name, seconds, "merge.py", ("--json", "{out}/rows.json", *arguments))


def stop(name: str, seconds: int, *arguments: str) -> Stage:
    """Return a stage of bench/stop.py."""
    return Stage(name, seconds, "stop.py", ("--json", "{out}/stop.json", *arguments))


def chart(name: str, kind: str, rows: str) -> Stage:
    """Return a stage that draws one kind of rows and writes their tables."""
    files = (f"{{out}}/{rows}.json", "--chart", f"{{out}}/{rows}.png", "--table", f"{{out}}/{rows}.md")
    return Stage(name, 15, "plot.py", (kind, *files))


def profile(name: str, seconds: int, shape: str, kernels: str) -> Stage:
    """Return a stage in which ncu counts what bounds each kernel at a shape, at its second launch."""
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats")
    under = ("ncu", "--clock-control", "none", "--log-file", f"{{out}}/{name}.txt")
    under += ("--kernel-id", f"::regex:^({kernels})$:2", *(word for s in sections for word in ("--section", s)))
    return Stage(name, seconds, "exercise.py", ("--shape", shape), under)


def sanitize(tool: str, seconds: int) -> Stage:
    """Return a stage that runs every kernel for one video under a tool of compute-sanitizer."""
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--log-file", f"{{out}}/{tool}.txt")
    return Stage(tool, seconds, "exercise.py", ("--shape", "stop-b32-video-r2"), under)


VERSIONS = Stage("versions", 15, "versions.py")
NO_GPU = 3  # the status of VERSIONS where torch finds no GPU: tests would all be skipped, and benchmarks measure a CPU
TEST_GPU = ("tests/ops/test_gpu.py",)
TEST_BACKENDS = ("-k", "triton", "tests/ops")
SMALL_TESTS = "graph or direct_calls or multiples_of_16"
SEVEN = "match_item|reduce_rows|spread_rows|norm_rows|norm_grad_rows|attend|grad_item"
HALF = ("--dtype", "bfloat16")
TUNE = ("--json", "{out}/tune.json")
FUSED = ("--json", "{out}/fused.json", "--seconds", "0.3")
MODEL = Stage(
    "roofline",
    15,
    "roofline.py",
    ("--against", *(f"{{out}}/{name}.json" for name in ("rows", "fused", "attention", "tune"))),
)
ATTENTION = ("--json", "{out}/attention.json", "--seconds", "0.3")
ONE_VIDEO = ("--videos", "1", "--scope", "blocks", "--direction", "inference", "--settings", "r=0", "r=8")
ONE_VIDEO += ("--ways", "eager", "graph")  # where compile is added, it comes last: it takes the most time
TOWERS = ("--scope", "prompts", "proper", "tower")  # cuDNN's conv3d is upstream's, as it comes and channels last

FIRST = (  # is it right, how fast, what bounds it
    VERSIONS,
    pytest("test-gpu", 125, *TEST_GPU),
    merge(
        "merge", 40, "--dtype", "bfloat16", "--no-compile", "--backend", "triton", "--seconds", "12", "--shapes", FIVE
    ),
    Stage("fused", 30, "fused.py", FUSED),
    Stage("attention", 40, "attention.py", ATTENTION),
    Stage("tune", 40, "tune.py", TUNE),
    stop("stop-blocks", 30, "--scope", "blocks", "--settings", "r=0", "r=2", "r=8", "--seconds", "2"),
    profile("ncu", 30, "stop-b32-train", SEVEN),
    sanitize("memcheck", 20),
    MODEL,
)
SECOND = (  # right again, with a compiler, whole towers
    VERSIONS,
    pytest("test-gpu", 80, *TEST_GPU),
    pytest("test-backends", 60, *TEST_BACKENDS),
    merge("merge-compile", 45, *HALF, "--seconds", "10", "--shapes", THREE),
    stop("stop-one-video", 25, *ONE_VIDEO, "--seconds", "2"),
    stop("stop-tower", 35, *TOWERS, "--settings", "r=0", "r=4", "--videos", "16", "--seconds", "2"),
    stop("stop-float32", 15, "--scope", "prompts", "--dtype", "float32", "--videos", "16", "--seconds", "1"),
    chart("chart", "operators", "rows"),
)
SMALL = (  # one video: eager, in a CUDA graph, compiled
    stop("stop-one-video", 155, *ONE_VIDEO, "compile", "--seconds", "3"),
    chart("stop-one-video-chart", "stop", "stop"),
)
TESTS = (
    pytest("test-gpu", 150, *TEST_GPU),
    pytest("test-backends", 220, *TEST_BACKENDS),
    Stage("native", 70, "gpu_suite.py", ("--build",)),
    pytest("test-native", 60, "-k", "native and not 2_31", "tests/ops/test_native.py", "tests/ops/test_merge.py"),
    sanitize("racecheck", 15),
)
BENCH = (
    merge("merge-bfloat16", 140, *HALF, "--seconds", "25"),
    stop("stop-training", 120, "--seconds", "6"),
    Stage("fused", 50, "fused.py", FUSED),
    merge("merge-float32", 70, "--dtype", "float32", "--no-compile", "--seconds", "25"),
    Stage("attention", 40, "attention.py", ATTENTION),
    Stage("blocks", 30, "blocks.py", ("--json", "{out}/blocks.json", "--seconds", "3")),
    Stage("tune", 40, "tune.py", TUNE),
    chart("chart", "operators", "rows"),
    chart("stop-chart", "stop", "stop"),
    MODEL,
)
MODELS = (
    Stage("models", 330, "models.py", ("--json", "{out}/models.json", "--seconds", "6", "--direction", "inference",
                                       "training")),
    chart("models-chart", "models", "models"),
)  # fmt: skip
PLANS: dict[str, tuple[Stage, ...]] = {
    "first": FIRST,
    "second": SECOND,
    "tests": (VERSIONS, *TESTS),
    "bench": (VERSIONS, *BENCH),
    "models": (VERSIONS, *MODELS),
    "small": (VERSIONS, pytest("test-small", 60, "-k", SMALL_TESTS, *TEST_GPU), *SMALL),
    "all": (VERSIONS, *TESTS, *BENCH, *SMALL),
}

# What makes a script's run small where there is no GPU; argparse takes the last of options that are given twice.
SMALLEST = {
    "merge.py": ("--dry", "--no-compile", "--backend", "triton", "--shapes", "stop-b32-video-r2"),
    "blocks.py": ("--dry", "--shapes", "stop-b32-video-r2"),
    "fused.py": ("--dry", "--shapes", "stop-b32-video-r2"),
    "stop.py": ("--dry", "--layers", "2", "--settings", "r=0", "r=2", "--direction", "inference"),
    "models.py": ("--dry", "--models", "ViT-S/16", "--modes", "plain", "--layers", "1"),
    "attention.py": ("--dry", "--cases", "vit-h14-257"),
    "tune.py": ("--dry", "--kernels", "norm_rows", "--shapes", "stop-b32-video-r2"),
    "exercise.py": ("--dry", "--shape", "stop-b32-video-r2"),
}


def dry() -> tuple[Stage, ...]:
    """Return each script of the plans once, bench/stop.py also in all ways. Of the tests all are collected, and a few
    run; what builds or runs native code, and a profiler or sanitizer itself, is left to machines that have them."""
    found: dict[tuple[str, ...], Stage] = {}
    for stage in (*FIRST, *SMALL, *SECOND, *BENCH, *MODELS):
        if stage.script != "pytest":
            kinds = stage.arguments[:1] if stage.script == "plot.py" else ("--ways",)
            which = tuple(word for word in kinds if word in stage.arguments)
            found.setdefault((stage.script, *which), stage)
    stages = list(found.values())
    stages.insert(1, pytest("collect", 60, "-k", "triton or test_gpu", "--collect-only", "-qq", "tests/ops"))
    stages.insert(2, pytest("test-gpu", 60, *TEST_GPU, "-k", "video and dtype0 and not prefix"))
    return tuple(stages)
