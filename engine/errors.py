"""The error for bad input, and the words that help to correct it. Imports nothing of the project."""
from __future__ import annotations

import difflib

LONGEST = 200       # characters of a value that an error shows


class ConfigError(ValueError):
    """Bad input by the user: shown on one screen, exit code 2, no traceback."""


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
