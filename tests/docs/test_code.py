# SPDX-License-Identifier: Apache-2.0
"""Python of README and docs runs and prints what they say; commands, options and targets that they name are there."""

import contextlib
import importlib.util
import inspect
import io
import re
import shlex
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import stoptome_kernels as stk
import torch

from harness import libraries  # noqa: F401  (first of all that may import torchvision)
from support import ROOT, pages

WITH_PYTHON = [page for page in pages.PAGES if any(block.language == "python" for block in pages.blocks(page))]
SHELL = [(page, block) for page in pages.PAGES for block in pages.blocks(page) if block.language == "bash"]


@pytest.fixture
def offline(monkeypatch):
    """Give models random weights where a page loads trained ones; of an export, which takes long, check the call."""
    signature = inspect.signature(torch.onnx.export)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: signature.bind(*args, **options))
    if importlib.util.find_spec("timm") is None:
        return
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))


def test_every_language_is_known():
    """A block of another language would be run by no test here."""
    for page in pages.PAGES:
        for block in pages.blocks(page):
            assert block.language in ("python", "setup", "text", "bash", "diff"), f"{pages.name(page)}:{block.line}"


@pytest.mark.slow  # whole models of the size that a page is about
@pytest.mark.parametrize("page", WITH_PYTHON, ids=pages.name)
def test_python_runs_and_prints_what_it_says(page, offline, monkeypatch, tmp_path):
    """The blocks of a page run one after the other; a block of text after one is what it prints."""
    if "import timm" in page.read_text():
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["page"])
    torch.manual_seed(0)
    namespace = {"sys": sys}
    found = pages.blocks(page)
    for place, block in enumerate(found):
        if block.language not in ("python", "setup"):
            continue
        said = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.text, pages.name(page), "exec")
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(code, namespace)
        after = found[place + 1] if place + 1 < len(found) else None
        if after is not None and after.language == "text":
            assert said.getvalue().strip() == after.text.strip(), f"{pages.name(page)}:{after.line}"


def test_what_the_readme_calls_equivalent_is():
    """The eager form beside the operators gives their rows and sizes."""
    (eager,) = (block.text for block in pages.blocks(ROOT / "README.md") if "def merge_pairs" in block.text)
    namespace = {"torch": torch}
    exec(eager, namespace)
    metric, x, size = torch.randn(3, 17, 8), torch.randn(3, 17, 16), torch.randint(1, 4, (3, 17)).float()
    y, sizes = stk.merge(x, stk.match(metric, 5), size)
    same, column = namespace["merge_pairs"](metric, x, size[..., None], 5)
    torch.testing.assert_close(same, y)
    assert torch.equal(column[..., 0], sizes)


def commands(text: str) -> list[list[str]]:
    """Return the words of each command of a shell block, without comments."""
    found = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [words for words in found if words]


def options_of(script: Path) -> str:
    """Return the sources in which a script's options are: its own, and those that its command line is made of."""
    parts = {"main.py": ["retrieval/flags.py", "../../stoptome_kernels/tome/config.py"]}.get(script.name, [])
    if any(f"cli.{name}(" in script.read_text() for name in ("parser", "main_by_shape", "add_dry")):
        parts = ["harness/cli.py"]
    return "\n".join(file.read_text() for file in (script, *(script.parent / part for part in parts)))


@pytest.mark.parametrize(("page", "block"), SHELL, ids=[f"{pages.name(page)}:{block.line}" for page, block in SHELL])
def test_commands_are_there(page, block):
    """Scripts exist and have the options, targets are in the Makefile, extras in pyproject.toml."""
    makefile, project = (ROOT / "Makefile").read_text(), (ROOT / "pyproject.toml").read_text()
    folder = ROOT
    for words in commands(block.text):
        while "=" in words[0]:  # of the environment
            words = words[1:]
        program, *rest = words
        if program == "cd":
            folder = folder / rest[0]
            assert folder.is_dir(), rest
        elif program == "make":
            for word in rest:
                variable, is_variable, _ = word.partition("=")
                pattern = rf"^{variable} \?=" if is_variable else rf"^{re.escape(word)}:"
                assert re.search(pattern, makefile, re.M), word
        elif program == "pip":
            assert rest[0] == "install"
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
                assert all(re.search(rf"^{name} = \[", project, re.M) for name in extra.split(",")), extra
        elif program in ("python", "torchrun") and rest[0] != "-m":
            script = next(word for word in rest if word.endswith(".py"))
            assert (folder / script).is_file(), script
            known = options_of(folder / script)
            for word in rest[rest.index(script) + 1 :]:
                if word.startswith("--") and word != "--help":
                    assert f'"{word.partition("=")[0]}"' in known, word
        elif program.startswith(("bench/", ".ci/")):
            assert (ROOT / program).is_file(), program
        else:
            assert program in ("git", "pre-commit", "pytest", "python"), words


def added(block: pages.Block) -> str:
    """Return the lines that a diff adds."""
    return textwrap.dedent("\n".join(line[1:] for line in block.text.splitlines() if re.match(r"\+(?!\+\+)", line)))


def test_four_lines_patch_stop(monkeypatch, tmp_path):
    """The diffs of docs/stop.md, put where they belong in stand-ins for STOP's files."""
    from stoptome_kernels.stop import StopConfig, StopModel

    params, model, embeddings = (
        added(block) for block in pages.blocks(ROOT / "docs/stop.md") if block.language == "diff"
    )
    assert len([*params.splitlines(), *model.splitlines()]) == 4
    (tmp_path / "params.py").write_text(
        "import argparse, types\n\ndef get_args(argv):\n    parser = argparse.ArgumentParser()\n"
        + textwrap.indent(params, "    ")
        + "\n    args = parser.parse_args(argv)\n    args.new_added_modules = []\n"
        + textwrap.indent(embeddings, "    ")
        + "\n    return args\n"
    )
    (tmp_path / "clip4clip.py").write_text(
        "from torch import nn\n\nclass CLIP4Clip(nn.Module):\n    def __init__(self, clip, task_config):\n"
        "        super().__init__()\n        self.clip = clip\n" + textwrap.indent(model, "        ") + "\n"
    )
    (patch,) = (
        block.text for block in pages.blocks(ROOT / "docs/stop.md") if "remove_tome_patch, tome_trace" in block.text
    )
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/tome_patch.py").write_text(patch)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("params", "clip4clip", "modules", "modules.tome_patch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from clip4clip import CLIP4Clip
    from modules.tome_patch import apply_tome_patch
    from params import get_args

    assert apply_tome_patch is stk.apply_tome_patch
    config = StopConfig(temporal_prompt="DGL", layers=2, text_layers=1, vocab_size=64)
    for flags, patched in (([], False), (["--tome_r", "0"], False), (["--tome_r", "2"], True)):
        args = get_args(flags)
        assert args.new_added_modules == ["tome_frame_embedding"]
        assert stk.is_patched(CLIP4Clip(StopModel(config), args)) == patched
    for name in ("params", "clip4clip", "modules", "modules.tome_patch"):
        monkeypatch.delitem(sys.modules, name, raising=False)
