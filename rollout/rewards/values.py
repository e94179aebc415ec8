"""What a reward function returned, as checked numbers: one entry per completion, each a float that
training can use or a Failure.

A Failure never becomes a number: what is not finite in float32, in which advantages are computed,
is no reward.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
import traceback
from collections.abc import AsyncIterator, Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from tandem.engine.core.foreign import message


@dataclass(frozen=True)
class Failure:
    kind: str  # exception | not_finite | arity
    message: str


def of_group(result: Any, samples: int) -> tuple[float | Failure | None, ...]:
    """The entries of a result for a whole group: any ordered collection of numbers, generators too.

    None: does not apply.
    """
    entries = None
    if not isinstance(result, (str, bytes, Mapping, Set)):
        with contextlib.suppress(TypeError):
            entries = iter(result)
    if entries is None:
        wanted = f"expected a list of {samples} numbers, one per completion"
        failure = Failure("arity", f"returned {describe(result)}, {wanted}")
        return (failure,) * samples
    # one more than wanted is enough to see that a generator has no end
    entries = list(itertools.islice(entries, samples + 1))
    if len(entries) != samples:
        count = f"more than {samples}" if len(entries) > samples else str(len(entries))
        failure = Failure("arity", f"returned {count} rewards for {samples} completions")
        return (failure,) * samples
    found = []
    for entry in entries:
        found.append(None if entry is None else of_sample(entry))
    return tuple(found)


async def collect(result: AsyncIterator, samples: int) -> list[Any]:
    """The entries of an asynchronous generator, but one more than wanted at most."""
    entries = []
    async for entry in result:
        entries.append(entry)
        if len(entries) > samples:
            break
    return entries


def of_verl(result: Any) -> float | Failure:
    """verl's functions return a number, or a dict with the number as its `score`."""
    if not isinstance(result, Mapping):
        return of_sample(result)
    if "score" not in result:
        return Failure(
            "arity",
            f"returned a dict with keys {short(list(result))}, expected the key 'score' in it",
        )
    return of_sample(result["score"])


def of_sample(value: Any) -> float | Failure:
    """One number.

    Python's, numpy's and torch's scalars are numbers, and so are booleans and decimals.
    """
    if value is None:
        return Failure("not_finite", "returned None, expected a number")
    if isinstance(value, Mapping):
        return Failure(
            "arity", f"returned a dict with keys {short(list(value))}, expected a number"
        )
    try:
        # numpy and torch scalars
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()
        if not isinstance(value, (numbers.Real, Decimal)):
            return Failure("arity", f"returned {describe(value)}, expected one number")
        number = float(value)
    except OverflowError:
        return Failure("not_finite", f"returned {describe(value)}, which is too large for a float")
    except Exception as error:  # of a number-like object of the user's
        return Failure(
            "exception",
            (
                f"returned an object of type {type(value).__name__} that cannot be made a float: "
                f"{message(one_line(error))}"
            ),
        )
    return finite(number, "returned")


def finite(number: float, what: str) -> float | Failure:
    """`number`, if float32 can hold it; `what` begins the message if not."""
    if not math.isfinite(number):
        return Failure("not_finite", f"{what} {number}")
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(number)):
            return Failure(
                "not_finite",
                (
                    f"{what} {number:g}, which is infinite in float32, the precision of rewards "
                    f"and advantages (largest {np.finfo(np.float32).max:.3g})"
                ),
            )
    return number


def weighted_sum(parts: list[tuple[float, float]]) -> float | Failure:
    """The sum of weight * value over (weight, value)."""
    total = sum(weight * value for weight, value in parts)
    return finite(total, "the weighted sum of the rewards is")


def describe(value: Any) -> str:
    return f"{type(value).__name__} {short(value)}"


def short(value: Any) -> str:
    """The beginning of an object's repr, whatever that does."""
    try:
        text = repr(value)
    except Exception as error:
        return f"(its __repr__ raised {type(error).__name__})"
    text = message(text, 200)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(error: BaseException) -> str:
    """Type and text of an exception, as the last line of its traceback has it."""
    last = traceback.format_exception_only(error)[-1]
    return " ".join(last.split())
