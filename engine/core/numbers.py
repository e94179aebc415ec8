"""Numbers as they come from the user's files."""

from __future__ import annotations

import math


def finite_number(value: object) -> float | None:
    """The number that a value of a JSON row is; None for any other value, for one that is not
    finite, and for one that no float holds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
