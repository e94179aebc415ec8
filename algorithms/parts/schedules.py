"""Schedules: a number over time. Any coefficient, prefix length or hint probability can take one.

A schedule is a pure function of the optimizer step (0-based) and of the signals, each metric of the
run as it was last measured. The run carries and checkpoints those, a schedule has no state, and it
is the same on every rank. In a config it is a number or a mapping, e.g. `mu: {kind: cosine, peak:
0.9, valley: 0.05, decay: 200}` or `mu: {kind: reward_gap, peak: 0.5}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tandem.engine.config.options import build, read_number
from tandem.engine.core.text import closest

# what a kind reads by default
SIGNAL = {
    "reward_gap": "reward/mean",
    "gate": "reward/mean",
    "entropy_exp": "entropy",
    "saturating": "grad_norm",
}
KINDS = ("constant", "linear", "cosine", "step", "periodic", *SIGNAL)
NONE: Mapping[str, float] = {}


@dataclass(frozen=True)
class Schedule:
    """A coefficient over time.

    kind         value at step t
    constant     peak
    linear       warm-up 0 -> peak over `warmup` steps, then peak -> valley linearly over `decay`
                 steps, then valley
    cosine       the same with a half cosine:
                 valley + (peak - valley)(1 + cos(pi (t - warmup)/decay))/2
                 (CHORD, arXiv 2508.11408, authors' code)
    step         peak while t < decay, then valley (SFT->RL: 1 -> 0)
    periodic     peak on every `period`-th step (t % period == 0), valley otherwise
                 (alternating SFT/RL)

    kind         value where the signal was s when last measured; peak before it ever was
    reward_gap   peak - s, kept within [valley, peak]
                 (CHORD's adaptive mu = max(0, tau - mean reward): peak is tau)
    gate         peak while s <= threshold, then valley (success gate)
    entropy_exp  peak exp(rate s)
                 (SRFT's weights: rate -1 for demonstrations, +1 for own samples)
    saturating   peak s/(s + threshold) (SASR's probability of an SFT step)

    `signal` names the metric of metrics.jsonl that is read: by default reward/mean, entropy or
    grad_norm. A step that does not measure it (one without rollouts has no reward/mean, a skipped
    one no finite grad_norm) leaves the value where it was. So what decides whether there are
    rollouts at all, and goes by their reward, needs a peak below 1: at 1 nothing would ever be
    measured.
    """

    kind: str = "constant"
    peak: float = 0.0
    valley: float = 0.0
    warmup: int = 0
    decay: int = 0
    period: int = 1
    signal: str | None = None
    threshold: float = 0.0
    rate: float = -1.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown schedule kind {self.kind!r}{closest(self.kind, KINDS)}; known: "
                f"{', '.join(KINDS)}"
            )
        if self.warmup < 0 or self.decay < 0 or self.period < 1:
            raise ValueError(f"schedule {self}: warmup and decay must be >= 0 and period >= 1")
        if self.signal is not None and self.kind not in SIGNAL:
            raise ValueError(
                f"schedule kind {self.kind!r} depends on the step alone, but signal is "
                f"{self.signal!r}; kinds with a signal: {', '.join(SIGNAL)}"
            )
        if self.kind == "saturating" and self.threshold < 0:
            raise ValueError(f"schedule {self}: threshold must be >= 0")

    @classmethod
    def parse(cls, value: Any, key: str = "schedule") -> Schedule:
        """From a number, a mapping of the fields above, or a Schedule.

        Raises ValueError that begins with `key` for anything else.
        """
        number = read_number(float, value)
        if number is not None:
            return cls(peak=number)
        if isinstance(value, (cls, Mapping)):
            return build(cls, value, key)
        raise ValueError(f"{key}: found {value!r}, expected a section or a number")

    @property
    def off(self) -> bool:
        """Zero forever."""
        return self.kind == "constant" and self.peak == 0.0

    @property
    def adaptive(self) -> bool:
        return self.kind in SIGNAL

    def within(self, low: float, high: float) -> bool:
        """Whether both ends are in [low, high]."""
        return low <= self.peak <= high and low <= self.valley <= high

    def __call__(self, step: int, signals: Mapping[str, float] = NONE) -> float:
        if self.adaptive:
            s = signals.get(self.signal or SIGNAL[self.kind])
            return self.peak if s is None or not math.isfinite(s) else self.of_signal(s)
        if self.kind == "constant":
            return self.peak
        if self.kind == "step":
            return self.peak if step < self.decay else self.valley
        if self.kind == "periodic":
            return self.peak if step % self.period == 0 else self.valley
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = min(1.0, (step - self.warmup) / self.decay) if self.decay else 1.0
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.valley + (self.peak - self.valley) * left

    def of_signal(self, s: float) -> float:
        if self.kind == "reward_gap":
            return min(self.peak, max(self.valley, self.peak - s))
        if self.kind == "gate":
            return self.peak if s <= self.threshold else self.valley
        if self.kind == "entropy_exp":
            return self.peak * math.exp(min(self.rate * s, 20.0))
        return self.peak * s / (s + self.threshold) if s + self.threshold > 0 else self.peak
