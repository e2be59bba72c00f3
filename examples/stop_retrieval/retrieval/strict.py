# SPDX-License-Identifier: Apache-2.0
"""JSON of other people."""

from __future__ import annotations

import json
from typing import Any

DIGITS = 300  # of an integer: more would be no float any more


def loads(data: bytes | str) -> Any:
    """Return what a text says; NaN and Infinity are numbers, as Python's own writer has them.

    Raises:
        ValueError: it is no JSON or no UTF-8, is nested too deeply, or has an integer that no float can hold; one line.
    """
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data  # editors put a mark in front
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON: {error.msg} in line {error.lineno}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"is no UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError("is no JSON of this kind: it is nested too deeply") from error


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"holds a number of {len(text)} digits, {text[:20]}…")
    return int(text)
