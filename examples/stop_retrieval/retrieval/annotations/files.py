# SPDX-License-Identifier: Apache-2.0
"""Reading annotation files of all kinds, and finding videos. What is wrong with a file ends as a UsageError."""

from __future__ import annotations

import csv
import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from .. import strict
from ..errors import UsageError
from . import plain_pickle

# of files that differ in nothing else, the first of these is taken
SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ogv", ".mts", ".m2ts",
    ".ts", ".vob", ".asf",
)  # fmt: skip


class File:
    """An annotation file.

    Args:
        path: of the file.
        flag: that gave it, or the folder it is in.
        hint: what should be there, said if it isn't.
    """

    def __init__(self, path: str, flag: str, hint: str):
        self.path, self.flag, self.hint = path, flag, hint

    def __str__(self) -> str:
        return f"{self.path} ({self.flag})"

    def wrong(self, what: str) -> UsageError:
        """To be raised: the file's name and what is wrong with it."""
        return UsageError(f"{self}: {textwrap.shorten(what, 400, placeholder=' …')}")

    @contextmanager
    def _open(self, mode: str = "r") -> Iterator[IO[Any]]:
        # utf-8-sig: Excel puts a mark in front; newline: csv wants to see line ends
        text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8-sig", "newline": ""}
        try:
            with open(self.path, mode, **text) as file:
                yield file
        except FileNotFoundError:
            raise self.wrong(f"no such file; {self.hint}") from None
        except IsADirectoryError:
            raise self.wrong(f"is a folder; {self.hint}") from None
        except UnicodeDecodeError as error:
            raise self.wrong(f"is no UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
        except OSError as error:
            raise self.wrong(f"can't be read: {error.strerror or error}") from error

    def lines(self) -> list[str]:
        """Its lines, without blank ones."""
        with self._open() as file:
            return [line for each in file if (line := each.strip())]

    def json(self) -> Any:
        with self._open() as file:
            text = file.read()
        try:
            return strict.loads(text)
        except ValueError as error:
            hint = "; is it all there?" if isinstance(error.__cause__, json.JSONDecodeError) else ""
            raise self.wrong(f"{error}{hint}") from error

    def table(self, columns: Sequence[str]) -> list[dict[str, str]]:
        """Rows of a comma-separated file with a header, by the header's names; ``columns`` must be among them."""
        with self._open() as file:
            reader = csv.DictReader(file, restval="", strict=True)
            try:
                header = reader.fieldnames or []
                for column in columns:
                    if column not in header:
                        raise self.wrong(f"has no column {column} in its first line; found: {', '.join(header) or '-'}")
                rows = []
                for row in reader:
                    if None in row:
                        raise self.wrong(f"line {reader.line_num} has more fields than the first line; a sentence with "
                                         "commas needs quotes around it")  # fmt: skip
                    rows.append(row)
                return rows
            except csv.Error as error:
                raise self.wrong(f"is no CSV: {error} in line {reader.reader.line_num}") from error

    def tabbed(self, fields: int) -> list[list[str]]:
        """Rows of a tab-separated file without a header, of so many fields each; quotes mean nothing in it."""
        with self._open() as file:
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            rows = []
            try:
                for row in reader:
                    if not any(field.strip() for field in row):
                        continue
                    if len(row) < fields or any(field.strip() for field in row[fields:]):
                        raise self.wrong(f"line {reader.line_num} has {len(row)} fields between tabs, not {fields}")
                    rows.append(row[:fields])
            except csv.Error as error:
                raise self.wrong(f"can't be read as text with tabs: {error} in line {reader.line_num}") from error
            return rows

    def unpickle(self) -> Any:
        """Plain data that was pickled. Nothing in the file is run."""
        with self._open("rb") as file:
            data = file.read()
        try:
            return plain_pickle.load(data)
        except plain_pickle.Forbidden as error:
            raise self.wrong(
                f"holds {error}, which is no plain data, so it was not loaded; make it anew of dict, list and str"
            ) from None
        except Exception as error:  # what the readers of opcodes raise of damaged ones is not limited
            raise self.wrong(f"is no pickle, or not all of one: {error or type(error).__name__}") from error

    def get(self, item: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        """``item[key]``, which must be there and of this kind; ``where`` says which item that is."""
        if not isinstance(item, dict):
            raise self.wrong(f"{where} is {_name(item)}, not an object with {key!r}")
        if key not in item:
            found = ", ".join(repr(name) for name in [*item][:6]) or "nothing"
            raise self.wrong(f"{where} has no {key!r}; found: {found}{', …' if len(item) > 6 else ''}")
        return self.kind(item[key], kind, f"{key!r} of {where}")

    def kind(self, value: Any, kind: type | tuple[type, ...], where: str) -> Any:
        """``value``, which must be of this kind."""
        if not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise self.wrong(f"{where} is {_name(value)}, not {' or '.join(_NAMES[each] for each in kinds)}")
        return value


_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false",
    type(None): "null", tuple: "a tuple",
}  # fmt: skip


def _name(value: Any) -> str:
    return _NAMES.get(type(value), f"of type {type(value).__name__}")


class VideoFiles:
    """The videos in a folder and the folders inside it, links included, by one listing.

    Attributes:
        folder: its path.
        count: videos found.
        example: the name of one.
    """

    def __init__(self, folder: str):
        if not os.path.isdir(folder):
            what = "is a file; give the folder that holds the videos" if os.path.exists(folder) else "no such folder"
            raise UsageError(f"{folder} (--features_path): {what}")
        self.folder = folder
        self._by_name: dict[str, str] = {}
        self._by_stem: dict[str, str] = {}
        videos = []
        seen = set()
        for root, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(root)
            if real in seen:  # a link to where we have been, perhaps around in circles
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            for name in sorted(names):
                path = os.path.join(root, name)
                self._by_name.setdefault(name, path)
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    videos.append((SUFFIXES.index(suffix.lower()), path, stem))
        for _, path, stem in sorted(videos):
            self._by_stem.setdefault(stem, path)
        self.count = len(videos)
        self.example = os.path.basename(videos[0][1]) if videos else ""

    def find(self, names: Sequence[str]) -> str | None:
        """The path of the first of these names that a file has, whole or without its suffix."""
        for name in names:
            if path := self._by_name.get(name) or self._by_stem.get(name):
                return path
        return None


def stem(name: str) -> str:
    """Return the name of a video without the suffix of its file, if it has one."""
    root, suffix = os.path.splitext(name)
    return root if suffix.lower() in SUFFIXES else name


def member(data_path: str, name: str, datatype: str, names: Sequence[str]) -> File:
    """A file in the folder --data_path, where ``names`` are all that the data set has there."""
    folder = File(data_path, "--data_path", f"for {datatype} it is a folder with {', '.join(names)}")
    if not os.path.isdir(data_path):
        raise folder.wrong(f"{'is a file' if os.path.exists(data_path) else 'no such folder'}; {folder.hint}")
    return File(os.path.join(data_path, name), folder.flag, folder.hint)
