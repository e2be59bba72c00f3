# SPDX-License-Identifier: Apache-2.0
"""Tables and charts: what loses is marked, nothing is published that was not measured, pages follow rows."""

import contextlib
import copy
import json
import shutil

import pytest

import plot
from charts import accuracy, blocks, common, host, models, operators, page, stop
from harness.rows import WHOLE
from support import ROOT

plt = pytest.importorskip("matplotlib.pyplot")
plt.switch_backend("agg")
# of CPUs, one machine a kind; what GPUs change is asked apart
ROWS = {
    kind: [row for row in page.rows_of(kind, ROOT / "bench/results") if row.get("device_kind") != "cuda"]
    for kind in page.KINDS
}


def changed(kind: str, where: dict, **values) -> str:
    """Return the tables of committed rows, those that match ``where`` with other values."""
    rows = copy.deepcopy(ROWS[kind])
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    assert found
    for row in found:
        row.update(values)
    return "\n\n".join(page.KINDS[kind].tables(rows))


def gpu(rows: list[dict]) -> list[dict]:
    """Return rows as if of a GPU, in bfloat16."""
    card = {
        "device_kind": "cuda",
        "device": "NVIDIA X",
        "dtype": "bfloat16",
        "driver": "1",
        "cuda": "13",
        "pages": None,
    }
    backend = {"native": "triton"}
    return [row | card | {"impl": backend.get(row["impl"], row["impl"])} if "impl" in row else row for row in rows]


def line(text: str, *starts: str) -> str:
    """Return the one line of a table that begins with these cells."""
    (found,) = (line for line in text.splitlines() if line.startswith("| " + " | ".join(starts)))
    return found


FORWARD = {"shape": "vit-b16-r16", "op": "match+merge", "direction": "forward"}


def test_operators_that_lose_are_marked():
    before = "\n\n".join(operators.tables(ROWS["operators"]))
    assert "slower" not in line(before.partition("forward and backward")[0], "vit-b16-r16", "96 × 197 → 181, 768")
    for impl in ("eager", "compile"):
        text = changed("operators", {**FORWARD, "impl": impl}, p50_us=1.0).partition("forward and backward")[0]
        assert line(text, "vit-b16-r16").count("slower**") == 1


def test_the_reference_has_a_table_of_its_own():
    assert "reference" not in "\n".join(operators.tables(ROWS["operators"])).lower()
    (text,) = operators.reference_tables(ROWS["operators"])
    assert line(text, "vit-b16-r16").count("slower") == 2


@pytest.mark.parametrize(("impl", "marked"), [("merge_norm", True), ("add, merge, layer_norm", False)])
def test_fused_operators_that_lose_are_marked(impl, marked):
    """Ours alone: what ours is compared with may be slow."""
    where = {"shape": "vit-b16-r16", "op": "merge_norm", "direction": "forward", "impl": impl}
    text = changed("fused", where, times_base=3.21)
    assert ("**3.21×, slower**" in text) == marked
    assert "3.21×" in text


def test_models_that_lose_to_eager_merging_are_marked():
    where = {"shape": "ViT-S/16", "direction": "inference", "op": "plain", "impl": "eager"}
    text = changed("models", where, images_per_s=1000.0)
    assert line(text.partition("training")[0], "ViT-S/16, batch 16", "plain").endswith("slower** |")
    text = changed("models", where | {"impl": "package"}, speedup=0.5)
    assert "**0.50×, slower** of" in line(text.partition("training")[0], "ViT-S/16, batch 16", "plain")


def test_stop_that_loses_is_marked():
    where = {"op": "blocks", "direction": "training", "shape": "r=4", "impl": "package"}
    text = changed("stop", where, speedup_vs_r0=0.4)
    text = text.partition("Twelve blocks with merging, against r = 0")[2].partition("### ")[0]
    assert "**0.40×, slower** of" in line(text, "training", "r=4", "12 × 8")
    eager = common.find(ROWS["stop"], **where | {"impl": "eager"})
    before = common.microseconds(eager["p50_us"])
    text = changed("stop", where, p50_us=1e9, saved_bytes=10**12).partition("against merging in eager operations")[2]
    assert line(text, "training", "r=4", before).count("**") == 4, "slower, and more memory"
    text = changed("stop", where | {"shape": "r=0"}, p50_us=1e9).partition("Twelve blocks with merging")[0]
    assert "slower**" in line(text, "blocks", "training")


def test_savings_below_the_guide_are_marked():
    assert stop.promised(0.12, (10, 15)) == "12 % (10–15 %)"
    assert stop.promised(0.096, (10, 15)) == "10 % (10–15 %)", "what is printed as 10 is not below 10"
    assert stop.promised(0.06, (10, 15)) == "**6 %, below 10–15 %**"
    assert stop.promised(0.06, None) == "6 %"


def test_blocks_that_lose_are_marked():
    """Ours alone, against both others."""
    where = {"shape": "vit-b16-r13", "op": "attention"}
    text = changed("blocks", where | {"impl": "package"}, p50_us=1e9)
    assert line(text, "vit-b16-r13", "this package").count("slower**") == 2
    assert "slower" not in line(
        changed("blocks", where | {"impl": "eager"}, p50_us=1e9), "vit-b16-r13", "eager PyTorch"
    )


def test_a_block_that_was_not_measured_whole_has_no_sum():
    """It would look faster than the others."""
    rows = [row for row in ROWS["blocks"] if (row["impl"], row["op"]) != ("package", "match")]
    text = "\n".join(blocks.tables(rows))
    assert "this package" not in text
    assert "eager PyTorch" in text
    assert blocks.total(rows, "vit-b16-r13", "package") is None


def test_accuracy_that_loses_more_is_marked():
    where = {"shape": "r=4", "direction": "inference", "impl": "merge"}
    assert "**" not in line(changed("accuracy", where, lost_mean=1.0), "r=4, at inference alone")
    assert "(more than the guide)**" in line(changed("accuracy", where, lost_mean=3.1), "r=4, at inference alone")
    assert "a baseline lost less" in line(changed("accuracy", where, lost_mean=99.0), "r=4, at inference alone")
    assert accuracy.points_lost(where | {"lost_mean": -0.04, "lost_interval": None}) == "0.0", "of one seed"
    assert accuracy.points_lost(where | {"lost_mean": 0.5, "lost_interval": (-0.01, 1.0)}) == "0.5 (0.0 to 1.0)"


@pytest.mark.parametrize(("interval", "mark"), [((0.1, 2.0), "*"), ((-0.1, 2.0), ""), ((-2.0, -0.1), "†")])
def test_baselines_that_differ_from_merging_are_marked(interval, mark):
    """By the interval of the paired differences."""
    where = {"shape": "r=4", "direction": "inference", "impl": "pool"}
    text = line(changed("accuracy", where, over_merging_interval=interval), "r=4, at inference alone")
    assert text.endswith(f"){mark} |")


def test_fused_operators_that_lose_to_separate_ones_are_marked():
    where = {"shape": "vit-b16-r16", "op": "attention", "direction": "forward", "impl": "concatenated, mask"}
    text = changed("fused", where, p50_us=1.0).partition("attention against")[2]
    assert line(text, "vit-b16-r16, 96 × 197", "forward |").endswith("slower** |")


def test_a_cuda_graph_that_loses_is_marked():
    rows = gpu(ROWS["operators"])
    for row in rows:
        row["graph_us"] = 10.0 if row["impl"] == "triton" else 5.0
    assert "10 µs, **0.50×, slower**" in operators.tables(rows)[0]


def test_targets_that_are_missed_are_marked():
    text = changed("host", {"op": "match", "direction": "forward", "impl": "native"}, met=True, target=6)
    assert line(text.partition("'s launch path")[0], "match", "forward").endswith("| ≤ 6× |")
    text = changed("host", {"op": "match", "direction": "forward", "impl": "native"}, met=False, target=6)
    assert line(text.partition("'s launch path")[0], "match", "forward").endswith("| ≤ 6×, **missed** |")
    assert host.verdict({"target": None}) == ""


def test_a_block_and_the_same_unpatched():
    where = {"op": "timm ViT block, r = 2", "direction": "forward", "impl": "native"}
    for met, mark in ((True, ""), (False, ", **missed**")):
        text = changed("host", where, met=met, target=1.25, times_unpatched=1.3).partition("'s launch path")[0]
        assert line(text, where["op"], "forward").endswith(f"| 1.30 | ≤ 1.25× unpatched{mark} |")


def test_parts_of_a_call():
    """A section of their own, a line each, empty where a call has none; no section of rows without parts."""
    plain = [row for row in ROWS["host"] if row.get("part") is None and row["impl"] == "native"]
    assert len(host.tables(plain)) == 1
    given = (("match", "the plan", 0.46), ("match", WHOLE, 9.0), ("merge", WHOLE, 8.0))
    parts = [plain[0] | {"op": op, "direction": "direct", "part": part, "p50_us": us} for op, part, us in given]
    (_, text) = host.tables(plain + parts)
    assert text.splitlines()[-2:] == [
        "| direct | the plan | 0.5 |  |",
        "| direct | **all of it** | **9.0** | **8.0** |",
    ]


def test_ratios_and_spans():
    assert common.speedup(0.996) == "1.00×", "what is printed as 1 is not marked"
    assert common.speedup(0.994) == "**0.99×, slower**"
    assert common.multiple(1.004) == "1.00×"
    assert common.multiple(1.006) == "**1.01×, slower**"
    assert common.span([1.0, 4.0]) == "2.00× (1.00 to 4.00×)"
    assert common.span([1.5]) == "1.50×"
    assert common.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_ratios_of_which_some_lose():
    assert common.span([0.5, 2.0]) == "1.00× (0.50 to 2.00×; slower in 1 of 2)"
    assert common.span([0.5, 0.5]) == "**0.50×, slower** (0.50 to 0.50×; slower in 2 of 2)"
    assert common.per_cent_less(0.7) == "30 %"
    assert common.per_cent_less(1.3) == "**30 % more**"
    assert common.change(2**20, 2**21) == "**1 MiB → 2 MiB, more**"


def mean(values: list[float]) -> str:
    product = 1.0
    for value in values:
        product *= value
    return f"{product ** (1 / len(values)):.2f}× ({min(values):.2f} to {max(values):.2f}×"


def test_the_summary_counts_what_it_says():
    """A value of each claim, computed once more by hand from the committed rows."""
    text = page.summary(ROWS)

    def times(kind: str, **where) -> dict:
        return {row["shape"]: row["p50_us"] for row in ROWS[kind] if all(row[k] == v for k, v in where.items())}

    both = {"op": "match+merge", "direction": "forward"}
    eager, native = (times("operators", impl=impl, **both) for impl in ("eager", "native"))
    ratios = [eager[shape] / native[shape] for shape in native]
    assert mean(ratios) + ") forward" in line(text, f"`match` + `merge`, over eager PyTorch, {len(ratios)} shapes")
    base, ours = (times("fused", op="attention", direction="forward", impl=i) for i in ("sdpa, no sizes", "attention"))
    assert mean([base[shape] / ours[shape] for shape in ours]).partition("(")[2] in line(text, "`attention` with sizes")
    compiled = {"direction": "inference", "op": "compiled"}
    plain, eager, ours = (times("models", impl=i, **compiled) for i in ("unpatched", "eager", "package"))
    own = line(text, f"{len(ours)} whole vision transformers, under `torch.compile`")
    assert mean([plain[name] / ours[name] for name in ours]) in own
    assert mean([eager[name] / ours[name] for name in ours]).partition("(")[2] in own
    blocks_in = {"op": "blocks", "direction": "inference"}
    upstream, ours = (times("stop", impl=i, **blocks_in) for i in ("upstream", "package"))
    own = line(text, "STOP's twelve blocks")
    assert f"{upstream['r=0'] / ours['r=4']:.2f}× inference" in own
    assert f"of it {upstream['r=0'] / ours['r=0']:.2f}× without merging" in own
    assert "not measured yet" in line(text, "GPU")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("b" * 40, False), ("b" * 40, False)], "Commit bbbbbbbbb"),
        ([("b" * 40, True), (None, False), ("a" * 40, False)], "Commits aaaaaaaaa, bbbbbbbbb (changed) and unknown"),
    ],
)
def test_all_commits_of_rows_are_named(rows, says):
    assert common.commits([{"commit": commit, "dirty": dirty} for commit, dirty in rows]) == says


def test_a_gpu_comes_first_and_is_named():
    rows = ROWS | {"operators": ROWS["operators"] + [row | {"graph_us": 5.0} for row in gpu(ROWS["operators"])]}
    assert "measured on NVIDIA X: operators" in line(page.summary(rows), "GPU")
    first = page.KINDS["operators"].tables(rows["operators"])[0]
    assert "NVIDIA X" in first
    assert "in a CUDA graph" in first


# counts are of no machine, and the host's time is of a CPU
OTHERS = ("gpu", "dtype", "torch", "threads", "pages")
MACHINES = [
    (kind, other) for kind in page.KINDS for other in OTHERS if kind != "launches" and (kind, other) != ("host", "gpu")
]


@pytest.mark.parametrize(("kind", "other"), MACHINES)
def test_machines_are_kept_apart(kind, other):
    """Rows of another machine, version, dtype or memory have tables of their own, and change no line of the first."""
    changes = {"torch": "9.9.9", "threads": 7, "pages": "fresh"}
    rows = ROWS[kind]
    extra = [row | {other: changes.get(other, f"other {row['dtype']}")} for row in rows]
    if other == "gpu":  # a card for each machine and dtype
        cards = [f"NVIDIA at {row['device']} for {row['dtype']}" for row in rows]
        extra = [new | {"device": card} for new, card in zip(gpu(rows), cards, strict=True)]
    alone, together = (page.KINDS[kind].tables(found) for found in (rows, rows + extra))
    assert len(together) == 2 * len(alone)
    assert {part.partition("\n")[2] for part in alone} <= {part.partition("\n")[2] for part in together}


@pytest.mark.slow
@pytest.mark.parametrize("kind", page.KINDS)
def test_rows_of_a_run_that_was_stopped(kind):
    """No crash in tables, charts and summary without any one implementation, operator, direction or shape."""
    rows, summary = ROWS[kind], page.summary(ROWS)
    for key in ("impl", "op", "direction", "shape"):
        for value in {row.get(key) for row in rows} - {None}:
            for whole in ([], gpu(rows)):
                fewer = [row for row in rows if row.get(key) != value] + whole
                if not fewer:
                    continue
                assert isinstance(page.benchmarks(ROWS | {kind: fewer}), str)
                assert page.summary(ROWS | {kind: fewer}) != "" != summary
                if key in ("impl", "op"):
                    for chart in page.KINDS[kind].charts:
                        with contextlib.suppress(ValueError):  # nothing to draw
                            plt.close(chart.draw(fewer, common.THEMES["light"]))


def test_charts_show_the_rows(monkeypatch):
    """The lengths of bars and the heights of points, not only a file."""
    figures = {}
    monkeypatch.setattr(common, "caption", lambda figure, lines: figures.update(last=figure))
    own = [row for row in ROWS["operators"] if (row["op"], row["direction"]) == ("match+merge", "forward")]
    operators.chart(ROWS["operators"], common.THEMES["light"])
    bars = {round(bar.get_width(), 4) for bar in figures["last"].axes[0].patches}
    for impl in ("native", "compile"):
        row, eager = (common.find(own, shape="vit-b16-r16", impl=i) for i in (impl, "eager"))
        assert round(eager["p50_us"] / row["p50_us"], 4) in bars
    accuracy.chart(ROWS["accuracy"], common.THEMES["light"])
    points = [line.get_ydata() for line in figures["last"].axes[0].lines]
    lost = common.find(ROWS["accuracy"], shape="clips", direction="inference", impl="merge")["lost_mean"]
    assert any(-lost in list(ys) for ys in points)
    stop.speedup_chart(ROWS["stop"], common.THEMES["light"])
    ours = next(line for line in figures["last"].axes[0].lines if line.get_label() == "this package")
    row = common.find(ROWS["stop"], op="blocks", direction="inference", shape="r=8", impl="package")
    assert list(ours.get_xdata()) == [0, 2, 4, 8]
    assert ours.get_ydata()[-1] == pytest.approx(row["speedup_vs_upstream"], abs=1e-3)
    stop.memory_chart(ROWS["stop"], common.THEMES["light"])
    heights = [round(bar.get_height(), 2) for bar in figures["last"].axes[3].patches]
    row = common.find(ROWS["stop"], op="blocks", direction="training", shape="r=8", impl="package")
    assert any(height == pytest.approx(100 * row["memory_vs_r0"], abs=0.05) for height in heights)
    blocks.chart(ROWS["blocks"], common.THEMES["light"])
    tops = [bar.get_y() + bar.get_height() for bar in figures["last"].axes[0].patches]
    ratio = blocks.total(ROWS["blocks"], "stop-b32-video-r8", "package") / blocks.total(
        ROWS["blocks"], "stop-b32-video-r8", "unmerged"
    )
    assert any(top == pytest.approx(100 * ratio) for top in tops)


@pytest.fixture
def project(tmp_path):
    """A folder with the committed rows, and pages that have room for a summary and for advice."""
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results", ignore=shutil.ignore_patterns("*.md"))
    (tmp_path / "docs").mkdir()
    for file, markers in ((plot.README, page.MARKERS), (plot.MODELS, page.ADVICE)):
        (tmp_path / file).write_text("before\n" + "\nold\n".join(markers) + "\nafter\n")
    return tmp_path


@pytest.mark.slow
def test_pages_follow_the_rows(project, capsys):
    assert plot.main(["--check"], project) == 1
    assert plot.main([], project) == 0
    readme, benchmarks = (project / name for name in (plot.README, plot.BENCHMARKS))
    text = readme.read_text()
    assert text.startswith(f"before\n{page.MARKERS[0]}\n\n|")
    assert text.endswith(f"\n{page.MARKERS[1]}\nafter\n")
    assert "old" not in text
    charts = {file.name: file.read_bytes() for file in (project / page.IMAGES).iterdir()}
    assert len(charts) == 2 * sum(len(kind.charts) for kind in page.KINDS.values())
    assert plot.main([], project) == 0
    assert charts == {file.name: file.read_bytes() for file in (project / page.IMAGES).iterdir()}, (
        "the same bytes again"
    )
    assert plot.main(["--check"], project) == 0
    for file in (readme, benchmarks):
        good = file.read_text()
        file.write_text(good.replace("1.", "2."))
        capsys.readouterr()
        assert plot.main(["--check"], project) == 1
        assert capsys.readouterr().err == (
            f"error: {file.relative_to(project)} is not what the rows give: run `python bench/plot.py`\n"
        )
        file.write_text(good)
    rows = next((project / "bench/results/blocks").glob("*.json"))
    rows.write_text(rows.read_text().replace("vit-b16-r13", "another"))
    capsys.readouterr()
    assert plot.main(["--check"], project) == 1
    assert "docs/images/blocks-light.svg is not" in capsys.readouterr().err


@pytest.mark.slow
def test_one_kind_of_committed_rows(project, tmp_path, capsys):
    """Its charts alone, and the pages, which are of all kinds."""
    assert plot.main(["blocks"], project) == 0
    assert {file.name for file in (project / page.IMAGES).iterdir()} == {"blocks-light.svg", "blocks-dark.svg"}
    alone = (project / plot.BENCHMARKS).read_text()
    table = tmp_path / "table.md"
    assert plot.main(["blocks", "--table", str(table)], project) == 0
    assert table.read_text() in alone
    assert plot.main(["all"], project) == 0
    assert (project / plot.BENCHMARKS).read_text() == alone
    assert len(list((project / page.IMAGES).iterdir())) == 2 * sum(len(kind.charts) for kind in page.KINDS.values())
    assert plot.main(["--check"], project) == 0


@pytest.mark.parametrize("case", ["no marker", "swapped", "no rows", "not rows", "other rows", "dry run", "dirty"])
def test_nothing_is_written_where_something_is_wrong(project, capsys, case):
    readme, rows = project / "README.md", next((project / "bench/results/operators").glob("*.json"))
    start, end = page.MARKERS
    if case == "no rows":
        for file in rows.parent.glob("*.json"):
            file.unlink()
    elif case == "not rows":
        rows.write_text("{}")
    elif case == "other rows":
        shutil.copy(next((project / "bench/results/stop").glob("*.json")), rows)
    elif case in ("dry run", "dirty"):
        wrong = {"dry run": {"device_kind": "none"}, "dirty": {"dirty": True}}[case]
        rows.write_text(json.dumps([row | wrong for row in json.loads(rows.read_text())]))
    else:
        readme.write_text({"no marker": "nothing here", "swapped": end + start}[case])
    before = readme.read_text()
    assert plot.main([], project) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    says = {"dry run": "nothing was measured", "dirty": "changed checkout", "no rows": "run `python bench/merge.py"}
    assert says.get(case, "") in said
    assert readme.read_text() == before
    assert not (project / "docs/benchmarks.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", page.KINDS)
def test_one_kind_from_files_of_ones_own(kind, tmp_path, capsys):
    what = page.KINDS[kind]
    files = [str(file) for file in sorted((ROOT / "bench/results" / kind).glob("*.json"))]
    chart = ["--chart", str(tmp_path / "chart.png")] if what.charts else []
    assert plot.main([kind, *files, *chart, "--table", str(tmp_path / "table.md")]) == 0
    rows = page.rows_of(kind, ROOT / "bench/results")
    assert (tmp_path / "table.md").read_text() == "\n\n".join(what.tables(rows)) + "\n"
    if chart:
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert plot.main([kind, *files]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chart", "a.png"], "say of which kind"),
        (["all", "a.json"], "say of which kind"),
        (["stop", "--check"], "leave the kind out"),
        (["host", "a.json", "--chart", "a.png"], "no chart of host"),
        (["nothing"], "invalid choice"),
    ],
)
def test_bad_arguments(capsys, arguments, says):
    with pytest.raises(SystemExit) as stopped:
        plot.main(arguments)
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_models_without_a_peer_are_shown_without_it():
    rows = [row for row in ROWS["models"] if row["impl"] != "eager"]
    text = "\n".join(models.tables(rows))
    assert "over eager merging" not in text
    assert "| ViT-S/16, batch 16 | plain |" in text


def test_batches_are_not_mixed():
    small = [row | {"n": 3, "images_per_s": 0.01} for row in ROWS["models"] if row["impl"] == "unpatched"]
    mixed, alone = (
        [line for part in models.tables(rows) for line in part.splitlines() if line.startswith("|")]
        for rows in (small + ROWS["models"], ROWS["models"])
    )
    assert mixed == alone
