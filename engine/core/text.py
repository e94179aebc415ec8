"""Small helpers for words in messages."""

from __future__ import annotations

import difflib

LONGEST = 200  # characters of a value that an error shows


def closest(word: str, known) -> str:
    """' (did you mean ...?)', or '' if nothing is close."""
    match = difflib.get_close_matches(str(word)[:LONGEST], [str(k) for k in known], n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def brief(value) -> str:
    """`value` as it is written in Python, cut after LONGEST characters."""
    text = repr(value)
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
