"""Mathematical equality by math-verify: `0.5` equals `\\frac{1}{2}`. Words and dates are compared
as such (words.py).

math-verify bounds its own time with SIGALRM and answers "not equal" when the alarm rings, which
would be a silent 0. Here its alarms are off and reward.timeout ends the call, so that the outcome
says timeout. It also answers "not equal" when the comparison itself raises; the expected answer is
therefore first compared with itself, and an error is raised if that fails.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from tandem.rollout.rewards.answers import mathematical_text
from tandem.rollout.rewards.words import could_be_product, is_date, last_box, literal, said

# math-verify says int, and takes None for its alarms to be off
NO_ALARM: Any = None
MARKS = ("$", "\\boxed", "\\fbox", "\\(", "\\[")


def equal(completion: str, ground_truth) -> float:
    """1 if the answer in the completion equals the expected one, else 0.

    The answer: what is in the last \\boxed{}; without one LaTeX in $...$, else the last number.

    Raises ValueError if the expected answer is missing or cannot be read as mathematics,
    ImportError without the package math-verify.
    """
    answer = mathematical_text(ground_truth)
    box = last_box(answer)
    word = literal(answer if box is None else box)
    given = said(completion)
    words = [literal(text) for text in given]
    if word is not None:
        if word in words:
            return 1.0
        if not could_be_product(word):
            return 0.0
    says_word = any(other is not None for other in words)
    if says_word and (word is not None or any(map(is_date, given))):
        return 0.0  # another word; or a date, which no number equals
    from math_verify import parse, verify

    box = last_box(completion)
    text = completion if box is None else boxed(box)
    found = parse(text, parsing_timeout=NO_ALARM)
    wanted = list(expected(answer))
    return float(verify(wanted, found, timeout_seconds=NO_ALARM))


@functools.lru_cache(maxsize=4096)
def expected(answer: str) -> tuple:
    """The expected answer, parsed: its last box if it has one, as it stands if it marks its LaTeX
    itself, else as if in \\boxed{}.
    """
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a warning that the alarms are off
    box = last_box(answer)
    if box is not None:
        text = boxed(box)
    elif any(mark in answer for mark in MARKS):
        text = answer
    else:
        text = boxed(answer)
    parsed = parse(text, parsing_timeout=NO_ALARM)
    if not parsed or not verify(parsed, parsed, timeout_seconds=NO_ALARM):
        raise ValueError(
            f"math-verify cannot read the expected answer {answer!r}; give it as a number or "
            "in LaTeX, or use the reward 'exact'"
        )
    return tuple(parsed)


def boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"
