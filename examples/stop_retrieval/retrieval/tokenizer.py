# SPDX-License-Identifier: Apache-2.0
"""CLIP's byte-pair tokenizer (Radford et al., 2021), run by Hugging Face's tokenizers."""

from __future__ import annotations

import gzip
import hashlib
import html
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _Tokenizer
from torch import Tensor

from .errors import UsageError

FILE = "bpe_simple_vocab_16e6.txt.gz"  # as CLIP's and STOP's checkouts have it
OWN = Path(__file__).with_name("clip_vocabulary.txt.gz")  # what CLIP reads of it, see NOTICE
MERGES = 48894  # of the lines in the file CLIP takes the first ones, which have this SHA-256
DIGEST = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
_LONGEST = 4 << 20  # bytes of the file once unpacked, which has 3.2 million
# Of a caption so many characters for each token are read, after the blanks in front: mending and splitting megabytes
# takes long, and no more than --max_words tokens come of it. A token of CLIP's has at most 32 bytes, and a hundred
# characters may stand for one (an entity of HTML, twice escaped and wrongly decoded): 1,000 are beyond any caption.
READ = 1000
SUFFIX = "</w>"  # marks the end of a word
WORDS = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Captions to CLIP's tokens.

    What looks like a special token in a caption is text to it, where CLIP's own code would take ``<|endoftext|>`` for
    the end of the caption.

    Args:
        vocabulary: path of CLIP's ``bpe_simple_vocab_16e6.txt.gz``; None: the part of it beside this module.

    Raises:
        UsageError: the file isn't there or isn't CLIP's.

    Attributes:
        size: number of tokens.
        start, end: tokens around every caption. ``end`` is the largest of all.
    """

    def __init__(self, vocabulary: str | os.PathLike[str] | None = None):
        merges = _read_merges(Path(vocabulary or OWN))
        alphabet = _byte_letters()
        words = alphabet + [letter + SUFFIX for letter in alphabet] + [a + b for a, b in merges]
        numbers = {word: number for number, word in enumerate(words)}
        self.start, self.end = len(words), len(words) + 1
        self.size = len(words) + 2
        self._bpe = _Tokenizer(models.BPE(numbers, merges, end_of_word_suffix=SUFFIX))
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip

    def __call__(self, texts: Sequence[str], max_words: int) -> Tensor:
        """Tokens ``(len(texts), max_words)``, int64: start, words, end, then zeros.

        Of a caption that is longer, the first ``max_words - 2`` words' tokens are kept, as STOP does; characters after
        the first ``READ * max_words`` are not looked at.

        Raises:
            UsageError: ``max_words`` leaves no room for start and end.
        """
        if max_words < 2:
            raise UsageError(f"--max_words must be 2 or more, for the start and the end of a caption; got {max_words}")
        rows = []
        for text in texts:
            # one by one: encode_batch starts threads, and data loaders fork later
            words = self._bpe.encode(clean(text.lstrip()[: READ * max_words])).ids[: max_words - 2]
            rows.append([self.start, *words, self.end] + [0] * (max_words - 2 - len(words)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), max_words)


def clean(text: str) -> str:
    """The text as CLIP reads it: mended by ftfy, HTML's entities replaced, one space between words, lower case."""
    if "&" in text or not (text.isascii() and text.isprintable()):  # neither step can change another, and ftfy is slow
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path) as file:
            lines = file.read(_LONGEST).decode().split("\n")[1 : MERGES + 1]  # the first line is a title
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path} can't be read as CLIP's vocabulary, {FILE}: {reason}") from error
    merges = [(pair[0], pair[1]) for line in lines if len(pair := line.split()) == 2]
    if len(merges) != MERGES:
        raise UsageError(f"{path} is not CLIP's vocabulary, {FILE}: it has {len(merges)} merges in place of {MERGES}")
    if hashlib.sha256("\n".join(lines).encode()).hexdigest() != DIGEST:
        raise UsageError(f"{path} is not CLIP's vocabulary, {FILE}: some of its merges are others")
    return merges


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's first 256 tokens: bytes that are printable in Latin-1
    stand for themselves and come first, the others follow from U+0100 on (as in GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(0x100 + number) for number in range(others)]
