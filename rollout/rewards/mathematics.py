"""Mathematical equality by math-verify: `0.5` equals `\\frac{1}{2}`.

math-verify bounds its own time with SIGALRM and answers "not equal" when the alarm rings, which would be a silent 0. Here its alarms are off and
reward.timeout ends the call, so that the outcome says timeout. It also answers "not equal" when the comparison itself raises; the expected answer
is therefore first compared with itself, and an error is raised if that fails.
"""
from __future__ import annotations

import functools
import logging


def equal(completion: str, ground_truth) -> float:
    """1 if the answer in the completion equals the expected one, else 0. The answer: LaTeX in \\boxed{} or $...$, else the last number.

    Raises ValueError if the expected answer cannot be read as mathematics, ImportError without the package math-verify.
    """
    from math_verify import parse, verify
    return float(verify(list(expected(str(ground_truth))), parse(completion, parsing_timeout=None), timeout_seconds=None))


@functools.lru_cache(maxsize=4096)
def expected(answer: str) -> tuple:
    """The expected answer, parsed: as it stands if it marks its LaTeX itself, else as if in \\boxed{}."""
    from math_verify import parse, verify
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)     # a warning that the alarms are off
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    parsed = parse(answer if marked else f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not parsed or not verify(parsed, parsed, timeout_seconds=None):
        raise ValueError(f"math-verify cannot read the expected answer {answer!r}; give it as a number or in LaTeX, or use the reward 'exact'")
    return tuple(parsed)
