"""Text from outside (dataset columns and ids, messages of user code and of libraries) made fit to
be written.

Python holds texts that no file can: half of a surrogate pair, as scraped data has it, has no form
in UTF-8. Such halves are spelled out (\\ud83d). Text may also be as long as it likes: what is
longer than a limit is cut, and says so at its end.
"""

from __future__ import annotations

import re
from typing import Any

COLUMN_CHARACTERS = 65_536  # of one dataset column in rollouts.jsonl, as text or JSON
MESSAGE_CHARACTERS = 4_000  # of an error message or a fact of an event
ID_CHARACTERS = 256  # of a row's id, and of a column's name

# all but tab and line feed; terminals obey some of them
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def valid(text: str) -> str:
    """`text` as it can be written in UTF-8: lone surrogates are spelled out."""
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def cut(text: str, limit: int) -> str:
    """The first `limit` characters, with a mark that tells how many there were."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} [cut: {limit} of {len(text)} characters]"


def message(text: str, limit: int = MESSAGE_CHARACTERS) -> str:
    """A message fit for a file and for a terminal: cut, valid, control characters spelled out."""
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", valid(cut(text, limit)))


def text_of(value: Any) -> str:
    """`str(value)`; objects that cannot say what they are do not raise here.

    It may hold lone surrogates.
    """
    try:
        return str(value)
    except Exception as error:
        cause = type(error).__name__
        return f"<{type(value).__name__} without a text: its __str__ raised {cause}>"
