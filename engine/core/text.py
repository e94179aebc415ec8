"""Small helpers for words in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 200  # characters of a value that an error shows


def closest(word: object, known: Iterable[object]) -> str:
    """' (did you mean ...?)', or '' if nothing is close."""
    names = [str(name) for name in known]
    found = difflib.get_close_matches(str(word)[:LONGEST], names, n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""


def brief(value: object) -> str:
    """`value` as it is written in Python, cut after LONGEST characters."""
    text = repr(value)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({len(text)} characters)"


def shorten(text: str, limit: int = 60) -> str:
    """`text`, cut to `limit` characters, the last three of them dots."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
