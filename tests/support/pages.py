# SPDX-License-Identifier: Apache-2.0
"""README and docs as tests see them: code blocks, headings, links, paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support import ROOT

TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "bench/README.md")
PAGES = [*(ROOT / name for name in TOP), *sorted(ROOT.glob("examples/*/*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
_BLOCK = re.compile(r"^(?:```(?P<language>\w*)\n(?P<text>.*?)^```|<!-- setup\n(?P<setup>.*?)^-->)$", re.M | re.S)


class Block(NamedTuple):
    """A code block of a page; ``setup`` blocks are comments, which readers do not see."""

    line: int
    language: str
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced code blocks of a page, and what its ``setup`` comments hold, in order."""
    text = page.read_text()
    return [
        Block(text.count("\n", 0, match.start()) + 2, match["language"] or "", match["text"])
        if match["setup"] is None
        else Block(text.count("\n", 0, match.start()) + 2, "setup", match["setup"])
        for match in _BLOCK.finditer(text)
    ]


def prose(page: Path) -> str:
    """Return a page without code blocks and comments."""
    return re.sub(r"<!--.*?-->", "", _BLOCK.sub("", page.read_text()), flags=re.S)


def anchors(page: Path) -> list[str]:
    """Return the anchors of a page's headings as a forge makes them; make docs checks those that MkDocs makes."""
    headings = (re.sub(r"\]\(.*?\)", "", text) for text in re.findall(r"^#+ (.*)$", prose(page), re.M))
    return [re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in headings]


def links(text: str) -> Iterator[str]:
    """Give the targets of links and images of Markdown, and of the HTML tags that hold charts."""
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"(?:src|srcset)=\"([^\"]+)\"", text)


def spans(text: str) -> list[str]:
    """Return the inline code of Markdown."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
