"""Numbers as the display shows them: short, and `-` for what is not known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int, low: float | None = None) -> str:
    """The whole history in at most `width` characters: means of equal stretches, scaled from `low`
    (default: the smallest value) to the largest.
    """
    finite = [value for value in values if value is not None and math.isfinite(value)]
    if not finite:
        return ""
    means = stretch_means(finite, min(width, len(finite)))
    if low is None:
        low = min(means)
    span = max(means) - low
    if span <= 0:
        return BARS[0] * len(means)
    return "".join(bar((mean - low) / span) for mean in means)


def stretch_means(values: Sequence[float], count: int) -> list[float]:
    """The means of `count` stretches of (nearly) equal length."""
    borders = [i * len(values) // count for i in range(count + 1)]
    means = []
    for start, end in pairwise(borders):
        means.append(sum(values[start:end]) / (end - start))
    return means


def bar(height: float) -> str:
    """The character for a height of at most 1."""
    return BARS[min(len(BARS) - 1, int(height * len(BARS)))]


def number(value: float | None) -> str:
    """Three significant places in at most seven characters."""
    if value is None or not math.isfinite(value):
        return "-"
    size = abs(value)
    if value == 0 or 0.001 <= size < 1000:
        return f"{value:.3f}"
    if size < 1:
        return f"{value:.0e}"
    return f"{value:.1e}"


def rate(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if value < 1000:
        return f"{value:.0f}"
    if value < 1e6:
        return f"{value / 1000:.1f}k"
    return f"{value / 1e6:.2f}M"


def percent(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0%}"


def clock(seconds: float | None) -> str:
    """12:07, or 1:12:07 from an hour on."""
    if seconds is None:
        return "-"
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{minute}:{second:02}"
