# SPDX-License-Identifier: Apache-2.0
"""All that is printed and logged. Names come from files, and a name may hold what a terminal obeys."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import unicodedata
from typing import NoReturn

from .errors import UsageError

log = logging.getLogger("stop_retrieval")
_STDOUT = "standard output"
_OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, format characters, surrogates, separators of lines and paragraphs
# of format characters those that are letters (they begin a number or a verse in Arabic, Syriac, Kaithi) …
_SHOWN = {*"\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"}
# … and joiners where they join, in emoji and in the scripts that need them
_JOINER = re.compile("(?<=[^\0-\x7f])[\u200c\u200d](?=[^\0-\x7f])")


def escape(text: str) -> str:
    """Return the text in one line of which a terminal shows every character: what it would obey or hide becomes
    ``\\x1b``, ``\\u202e`` and so on, as in Python's strings."""
    if text.isprintable():  # no character of these categories, nor one that Python doesn't know
        return text
    joins = {match.start() for match in _JOINER.finditer(text)}
    return "".join(
        letter.encode("unicode_escape").decode()
        if unicodedata.category(letter) in _OBEYED and letter not in _SHOWN and place not in joins
        else letter
        for place, letter in enumerate(text)
    )


def configure() -> None:
    """Let a terminal whose encoding lacks a character show its number; to be called before anything is printed."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line.

    Raises:
        UsageError: it can't be written.
    """
    try:
        print(escape(text), flush=True)
    except OSError as error:
        _give_up(_STDOUT, error)


def complain(text: str, kind: str = "error") -> None:
    """Print a line to standard error, if there is one; ``kind`` stands before it."""
    with contextlib.suppress(OSError):  # whoever closed it doesn't want to know
        print(f"{kind}: {escape(text)}", file=sys.stderr, flush=True)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun, of which the plural ends in s unless it is given."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Log a warning in one line, without the place in the code that it comes from; for ``warnings.showwarning``."""
    log.warning("%s", " ".join(str(message).split()))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record))


class _Printed(logging.StreamHandler):
    """A handler that logs on standard output."""

    name_of_file = _STDOUT

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            _give_up(self.name_of_file, error)
        super().handleError(record)


class _Written(_Printed):
    """A handler that adds what is logged to a file."""

    def __init__(self, path: str | os.PathLike[str]):
        self.name_of_file = os.fspath(path)
        try:
            file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115, close() closes it
        except OSError as error:
            _give_up(self.name_of_file, error)
        super().__init__(file)

    def close(self) -> None:
        super().close()
        with contextlib.suppress(OSError):  # each line was flushed, and the one that could not be was told of
            self.stream.close()


def log_to_terminal(prefix: str = "") -> None:
    """Print what is logged, each line behind ``prefix``."""
    handler = _Printed(sys.stdout)
    handler.setFormatter(_Formatter(f"{prefix}%(message)s"))
    log.addHandler(handler)


def log_to_file(path: str | os.PathLike[str]) -> None:
    """Add what is logged to a file, with the time.

    Raises:
        UsageError: it can't be written; so does whatever logs later.
    """
    handler = _Written(path)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.addHandler(handler)


def stop_logging() -> None:
    """Log nowhere any more."""
    for handler in log.handlers[:]:
        if isinstance(handler, _Printed):
            log.removeHandler(handler)
            handler.close()


def _give_up(name: str, error: OSError) -> NoReturn:
    if name == _STDOUT:  # else Python tries again at its end, and says so in its own way
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise UsageError(f"{name} can't be written: {error.strerror or error}; make room, or give another place") from error
