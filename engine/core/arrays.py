"""Arrays that carriers are made of: one number per token."""

from __future__ import annotations

from numbers import Real

import numpy as np

from tandem.engine.core.errors import CarrierError


def check_lengths(owner: str, expected: int, **streams) -> None:
    """Raise CarrierError naming the stream whose length is not the expected one; streams that are
    None are absent and fine.
    """
    for name, stream in streams.items():
        if stream is None:
            continue
        found = length(f"{owner}.{name}", stream)
        if found != expected:
            raise CarrierError(
                f"{owner}.{name} has {found} entries, expected {expected} (one per entry of "
                "the sequence)"
            )


def length(name: str, stream) -> int:
    try:
        return len(stream)
    except TypeError:  # a number, or an array of no dimension
        raise CarrierError(
            f"{name} is {stream!r}, expected an array with one entry per entry of the sequence"
        ) from None


def at_every_token(name: str, number: Real, size: int) -> np.ndarray:
    """One number as a floating-point array [size] of its own, which may be changed in place."""
    if isinstance(number, np.floating):
        return np.full(size, number)
    try:
        value = float(number)
    except OverflowError:
        raise CarrierError(f"{name} is a whole number too large for a float") from None
    return np.full(size, value)
