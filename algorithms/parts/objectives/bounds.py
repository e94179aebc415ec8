"""Bounds of numbers that objectives have in common."""

from __future__ import annotations


def check_clip_range(owner: str, clip_low: float, clip_high: float) -> None:
    """A ratio is clipped to [1 - clip_low, 1 + clip_high]; inf switches a side off.

    Raises ValueError that begins with `owner` if a side is negative: the interval would leave out
    the ratio 1 of an unchanged policy.
    """
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high)):
        if not value >= 0:
            raise ValueError(f"{owner}.{name} is {value}, must be at least 0")
