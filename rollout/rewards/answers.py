"""Expected answers: which values of a dataset can be compared with, and as what text.

A missing answer (null, NaN, empty) or one that is no text and no number (a list) can never be met,
so it is an error of its row and not a wrong completion. Rows are checked before a run, unless
the dataset is endless.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from tandem.engine.core.errors import ConfigError
from tandem.rollout.rewards.api import ground_truth
from tandem.rollout.rewards.values import describe

# built-in functions that need an expected answer of the kinds below
COMPARED = ("exact", "math")
CHECKED_ROWS = 1_000_000
SHOWN = 3  # rows named in an error
PROSE_WORDS = 5
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
MARKS = ("$", "\\boxed", "\\fbox", "\\(", "\\[", "\\text")  # of LaTeX


def expected_texts(value: Any) -> tuple[str, ...]:
    """The texts by which an expected answer is met, white space around them aside: one for a text;
    for a whole number that its column made a float (72 became 72.0, as next to nulls) the number it
    was, and the float's own. Raises ValueError for what is no answer.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        raise ValueError("the expected answer is missing (null)")
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("the expected answer is empty")
        return (value.strip(),)
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise ValueError(f"the expected answer is missing or no number: found {value}")
    if isinstance(value, float) and value.is_integer():
        return str(int(value)), str(value)
    if isinstance(value, (bool, int, float, Decimal, datetime.date, datetime.time)):
        return (str(value),)
    raise ValueError(
        f"the expected answer is a {describe(value)}, expected text or a number; write it as "
        "such, or compare in a function of your own"
    )


def mathematical_text(value: Any) -> str:
    """The expected answer of `math`, which is compared by meaning: one text is enough.

    Raises ValueError for prose, too.
    """
    text = expected_texts(value)[0]
    if "####" in text:
        raise ValueError(
            f"the expected answer is a solution and not an answer: found {describe(text)}; "
            "keep only what follows the last ####"
        )
    words = WORD.findall(text)
    prose = len(words) >= PROSE_WORDS and re.search(r"\d", text)
    marked = any(mark in text for mark in MARKS)
    if prose and not marked:
        raise ValueError(
            f"the expected answer is prose with numbers in it: found {describe(text)}; give "
            f"the answer alone, or in \\boxed{{}}"
        )
    return text


def unusable(name: str, row: Mapping[str, Any]) -> str:
    """Why the built-in function `name` can never score a row, or ''."""
    found = ground_truth(row)
    # a column that is not there at all is another error
    if name not in COMPARED or not found:
        return ""
    read = mathematical_text if name == "math" else expected_texts
    try:
        read(found["ground_truth"])
    except ValueError as error:
        return str(error)
    return ""


def check_answers(functions: Sequence[str], source: Any, key: str) -> None:
    """Raise ConfigError if rows of a dataset, set by `key`, have expected answers that a built-in
    function cannot compare with.

    `source` has `rows` (rows.py) and a length; rows without end are not looked at.
    """
    names = [name for name in functions if name in COMPARED]
    rows = getattr(source, "rows", None)
    if not names or rows is None or len(source) > CHECKED_ROWS:
        return
    found = []
    for number in range(len(source)):
        row = rows[number]
        for name in names:
            reason = unusable(name, row)
            if reason:
                found.append(f"{rows.label(number)}: reward {name!r}: {reason}")
                break
    if not found:
        return
    lines = found[:SHOWN]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN} more rows")
    lines.append(
        f"{len(found)} of the {len(source)} rows of {key} can never be scored. Mend or remove "
        "them, or set "
        "reward.check_answers=false: then each counts as a failed reward when its turn comes"
    )
    raise ConfigError("\n".join(lines))
