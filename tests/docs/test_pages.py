# SPDX-License-Identifier: Apache-2.0
"""README and docs: links and paths lead somewhere, numbers are those of the rows, what people ask is answered."""

import itertools
import re

import pytest

import plot
from charts import page as charts_page
from support import ROOT, pages

README = ROOT / "README.md"
FOLDERS = ("", "csrc/cpu", "stoptome_kernels", "tests", "bench", "examples/stop_retrieval")
# files of other projects, of runs, and of users
ELSEWHERE = re.compile(
    r"params\.py|clip4clip\.py|main_task_retrieval\.py|modules/.*|[^/]*\.(json|pt|txt|csv|pkl|faiss|tar|png|gif|mp4|jpg)|index/.*|"
    r"(output|data|path|index|tensorboard|dist|site|build)/.*|name/.*|CVPR.*|ckpt.*|raw-captions.*|mlp\.c_fc.*"
)


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 12 * 1024
    assert sum(line.startswith("|") for line in text.splitlines()) <= 25
    assert text.count("<picture>") <= 2


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_links_lead_somewhere(page):
    for target in pages.links(pages.prose(page)):
        if target.startswith(("https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} of {pages.name(page)}"
        if anchor:
            assert anchor in pages.anchors(file), f"{target} of {pages.name(page)}"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_paths_exist(page):
    """Inline code that looks like a file or a folder of this repository is one."""
    for span in pages.spans(pages.prose(page)):
        looks = re.fullmatch(r"[\w.*-]+(/[\w.*-]+)+/?|[\w*-]+\.(py|md|sh|toml|cpp|cff|yml)", span)
        if looks is None or ELSEWHERE.fullmatch(span):
            continue
        assert any(list((ROOT / folder).glob(span.rstrip("/"))) for folder in FOLDERS), f"{span} of {pages.name(page)}"


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_prose_is_as_wide_as_code(page):
    for line in pages.prose(page).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "#", "<", "    ")), line


@pytest.mark.parametrize("page", [file for file in pages.PAGES if file.name != "CHANGELOG.md"], ids=pages.name)
def test_headings_are_unique(page):
    """A link to the second of two would lead to the first."""
    found = pages.anchors(page)
    assert len(found) == len(set(found)), sorted({name for name in found if found.count(name) > 1})


def test_pages_are_what_the_rows_give(capsys):
    assert plot.main(["--check"]) == 0, capsys.readouterr().err


def test_no_table_is_wide():
    for line in (ROOT / "docs/benchmarks.md").read_text().splitlines():
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) - 2 <= 7, line


def test_every_chart_is_there_in_light_and_dark():
    for kind in charts_page.KINDS.values():
        for chart in kind.charts:
            for theme in ("light", "dark"):
                assert (ROOT / charts_page.IMAGES / f"{chart.name}-{theme}.svg").stat().st_size > 5000


# Each is answered on a page two clicks from the first screen of the README at most: the page, a heading, what it says.
QUESTIONS = {
    "Can I install it without a compiler?": ("README.md", "install", "Without one the install succeeds too"),
    "Which models of timm?": ("docs/models.md", "families", "`VisionTransformer` with `Block` and `ResPostBlock`"),
    "Is a whole model faster than with eager merging, on a CPU?": (
        "README.md", "what-it-gives", "merging in eager PyTorch is about as fast",
    ),
    "Do dense features work?": ("docs/models.md", "dense-outputs", "All others see the full sequence"),
    "How do I switch it on in STOP, with flags?": ("docs/stop.md", "stop-in-four-lines", "--tome_r 2"),
    "What does r mean, and which do I take?": ("docs/models.md", "choosing-r", "the number of tokens that each layer"),
    "Does it run on a GPU?": ("docs/gpu.md", "gpu", "The kernels have run on a GPU"),
    "Under which licence?": ("README.md", "documentation", "Apache-2.0"),
    "Can I export to ONNX?": ("docs/models.md", "onnx", "torch.onnx.export"),
    "How do I see what merged?": ("docs/models.md", "see-what-merged", "tome_trace"),
}  # fmt: skip


def section(page, anchor: str) -> str:
    """Return what stands under a heading, up to the next of its level or above."""
    lines = page.read_text().splitlines()
    fences = list(itertools.accumulate(line.startswith("```") for line in lines))
    begins = [n for n, line in enumerate(lines) if line.startswith("#") and fences[n] % 2 == 0]
    place = pages.anchors(page).index(anchor)
    level = lines[begins[place]].index(" ")
    end = next((n for n in begins[place + 1 :] if lines[n].index(" ") <= level), len(lines))
    return "\n".join(lines[begins[place] : end])


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_answered_within_two_clicks(question):
    name, anchor, answer = QUESTIONS[question]
    page = ROOT / name
    assert " ".join(answer.split()) in " ".join(section(page, anchor).split())
    first_screen = README.read_text().partition("## What it gives")[0]
    assert len(first_screen.splitlines()) <= 50
    reached = {README}
    texts = [(README, first_screen)]
    for _ in range(2):
        found = {
            (source.parent / target.partition("#")[0]).resolve()
            for source, text in texts for target in pages.links(text) if not target.startswith("https://")
        }  # fmt: skip
        texts = [(file, pages.prose(file)) for file in found - reached if file.suffix == ".md"]
        reached |= found
    assert page in reached
