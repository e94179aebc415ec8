"""How long a row may be, told from its characters where that is enough: most rows need no
tokenizer.
"""

from __future__ import annotations

import unicodedata

from tandem.engine.core.errors import ConfigError

# Bytes that a normalizer (NFD, NFKC and the like) may make of one: of a text that is composed
# already, and of any other text.
GROWTH = {True: 3, False: 12}
SPARE = 4  # a tokenizer may drop white space, or take a long word for one unknown token


class TooLong(ConfigError):
    """A row has more tokens than a limit allows."""


def most_tokens(text: str) -> int:
    """A bound on the tokens of a text: a token holds a character or, of rare characters, a byte."""
    if text.isascii():
        return len(text)
    return len(text.encode()) * GROWTH[unicodedata.is_normalized("NFKC", text)]


def refuse_huge(text: str, limit: int, longest_token: int, what: str, where: str) -> None:
    """Raise TooLong for a text that no `limit` tokens can hold: tokenising it would take minutes
    and gigabytes.
    """
    if len(text) > limit * longest_token * SPARE:
        raise TooLong(
            f"{where}: {what} has {len(text):,} characters, and {limit} tokens cannot hold as many"
        )
