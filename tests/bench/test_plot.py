# SPDX-License-Identifier: Apache-2.0
"""Tables and charts: what loses is marked, nothing is published that was not measured, pages follow rows."""

import copy
import json
import shutil

import pytest

import plot
from charts import accuracy, blocks, common, host, models, operators, page, stop
from support import ROOT

pytest.importorskip("matplotlib")
ROWS = {kind: page.rows_of(kind, ROOT / "bench/results") for kind in page.KINDS}


def changed(kind: str, where: dict, **values) -> str:
    """Return the tables of committed rows, those that match ``where`` with other values."""
    rows = copy.deepcopy(ROWS[kind])
    found = [row for row in rows if all(row[key] == value for key, value in where.items())]
    assert found
    for row in found:
        row.update(values)
    return "\n\n".join(page.KINDS[kind].tables(rows))


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
    text = changed("stop", where, speedup_vs_r0=0.4).partition("The whole visual tower")[0]
    assert "**0.40×, slower** of" in line(text, "training", "r=4", "12 × 8")
    text = changed("stop", where, p50_us=1e9).partition("against merging in eager operations")[2]
    assert "slower**" in line(text, "training", "r=4", common.microseconds(eager := stop.find(
        ROWS["stop"], op="blocks", direction="training", shape="r=4", impl="eager")["p50_us"]))  # fmt: skip
    assert eager < 1e9
    text = changed("stop", where | {"shape": "r=0"}, p50_us=1e9).partition("Twelve blocks with merging")[0]
    assert "slower**" in line(text, "blocks", "training")


def test_savings_below_the_guide_are_marked():
    assert stop.promised(0.12, (10, 15)) == "12 % (10–15 %)"
    assert stop.promised(0.096, (10, 15)) == "10 % (10–15 %)", "what is printed as 10 is not below 10"
    assert stop.promised(0.06, (10, 15)) == "**6 %, below 10–15 %**"
    assert stop.promised(0.06, None) == "6 %"


def test_blocks_that_lose_are_marked():
    where = {"shape": "vit-b16-r13", "op": "MLP", "impl": "package"}
    assert line(changed("blocks", where, p50_us=1e9), "vit-b16-r13", "this package").endswith("slower** |")
    total = sum(blocks.times(ROWS["blocks"], "vit-b16-r13", "eager").values())
    assert common.microseconds(total) in line("\n".join(blocks.tables(ROWS["blocks"])), "vit-b16-r13", "eager PyTorch")


def test_accuracy_that_loses_more_than_another_is_marked():
    where = {"shape": "r=4", "direction": "inference", "impl": "merge"}
    assert "more than another" not in line(changed("accuracy", where, lost_mean=1.0), "r=4, at inference alone")
    assert "more than another" in line(changed("accuracy", where, lost_mean=99.0), "r=4, at inference alone")
    assert accuracy.lost(where | {"lost_mean": 1.25, "lost_spread": None}) == "1.2"


def test_targets_that_are_missed_are_marked():
    text = changed("host", {"op": "match", "direction": "forward", "impl": "native"}, met=True, target=6)
    assert line(text.partition("Triton's launch path")[0], "match", "forward").endswith("| ≤ 6× |")
    text = changed("host", {"op": "match", "direction": "forward", "impl": "native"}, met=False, target=6)
    assert line(text.partition("Triton's launch path")[0], "match", "forward").endswith("| ≤ 6×, **missed** |")
    assert host.verdict({"target": None}) == ""


def test_ratios_and_spans():
    assert common.speedup(0.996) == "1.00×", "what is printed as 1 is not marked"
    assert common.speedup(0.994) == "**0.99×, slower**"
    assert common.multiple(1.004) == "1.00×"
    assert common.multiple(1.006) == "**1.01×, slower**"
    assert common.span([1.0, 4.0]) == "2.00× (1.00 to 4.00×)"
    assert common.span([1.5]) == "1.50×"
    assert common.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_the_summary_counts_what_it_says():
    """The mean of the committed rows, computed once more by hand."""
    own = [row for row in ROWS["operators"] if (row["op"], row["direction"]) == ("match+merge", "forward")]
    ratios = []
    for shape in {row["shape"] for row in own}:
        eager, native = (
            next(r["p50_us"] for r in own if (r["shape"], r["impl"]) == (shape, i)) for i in ("eager", "native")
        )
        ratios.append(eager / native)
    text = line(page.summary(ROWS), f"`match` + `merge`, over eager PyTorch, {len(ratios)} shapes")
    product = 1.0
    for ratio in ratios:
        product *= ratio
    assert f"{product ** (1 / len(ratios)):.2f}× ({min(ratios):.2f} to {max(ratios):.2f}×) forward" in text
    assert "not measured yet" in line(page.summary(ROWS), "GPU")


def test_a_gpu_comes_first_and_is_named():
    rows = copy.deepcopy(ROWS)
    card = {"device_kind": "cuda", "device": "NVIDIA X", "graph_us": 5.0}
    rows["operators"] += [
        row | card | {"impl": "triton" if row["impl"] == "native" else row["impl"]} for row in rows["operators"]
    ]
    assert "measured on NVIDIA X" in line(page.summary(rows), "GPU")
    first = page.KINDS["operators"].tables(rows["operators"])[0]
    assert "NVIDIA X" in first
    assert "in a CUDA graph" in first


@pytest.fixture
def project(tmp_path):
    """A folder with the committed rows, and a README that has room for a summary."""
    shutil.copytree(ROOT / "bench/results", tmp_path / "bench/results", ignore=shutil.ignore_patterns("*.md", "*.png"))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n" + "\nold\n".join(page.MARKERS) + "\nafter\n")
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


@pytest.mark.parametrize("case", ["no marker", "swapped", "no rows", "not rows", "dry run"])
def test_nothing_is_written_where_something_is_wrong(project, capsys, case):
    readme, rows = project / "README.md", next((project / "bench/results").glob("*.json"))
    start, end = page.MARKERS
    if case == "no rows":
        rows.unlink()
    elif case == "not rows":
        rows.write_text("{}")
    elif case == "dry run":
        rows.write_text(json.dumps([row | {"device_kind": "none"} for row in json.loads(rows.read_text())]))
    else:
        readme.write_text({"no marker": "nothing here", "swapped": end + start}[case])
    before = readme.read_text()
    assert plot.main([], project) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert {"dry run": "nothing was measured", "no rows": "run `python bench/merge.py"}.get(case, "") in said
    assert readme.read_text() == before
    assert not (project / "docs/benchmarks.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", page.KINDS)
def test_one_kind_from_files_of_ones_own(kind, tmp_path, capsys):
    what = page.KINDS[kind]
    files = [str(file) for file in sorted((ROOT / "bench/results" / what.folder).glob("*.json"))]
    chart = ["--chart", str(tmp_path / "chart.png")] if what.charts else []
    assert plot.main([kind, *files, *chart, "--table", str(tmp_path / "table.md")]) == 0
    assert (tmp_path / "table.md").read_text() == "\n\n".join(what.tables(ROWS[kind])) + "\n"
    if chart:
        assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert plot.main([kind, *files]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--chart", "a.png"], "say of which kind"),
        (["stop"], "which rows?"),
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


def test_models_without_a_peer_have_no_ratio():
    assert models.over_eager([row for row in ROWS["models"] if row["impl"] != "eager"]) == []
