"""Schedules: pure functions of the optimizer step (0-based, the same on every rank). Any coefficient can take one.

In a config a schedule is a number or a mapping, e.g. `mu: {kind: cosine, peak: 0.9, valley: 0.05, decay: 200}`.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.algorithms.options import build


@dataclass(frozen=True)
class Schedule:
    """A coefficient over time.

    kind      value at step t
    constant  peak
    linear    warm-up 0 -> peak over `warmup` steps, then peak -> valley linearly over `decay` steps, then valley
    cosine    the same with a half cosine: valley + (peak - valley)(1 + cos(pi (t - warmup)/decay))/2   (CHORD, arXiv 2508.11408, authors' code)
    step      peak while t < decay, then valley                                                        (SFT->RL: 1 -> 0)
    periodic  peak on every `period`-th step (t % period == 0), valley otherwise                       (alternating SFT/RL)
    """

    kind: str = "constant"
    peak: float = 0.0
    valley: float = 0.0
    warmup: int = 0
    decay: int = 0
    period: int = 1

    def __post_init__(self):
        if self.kind not in ("constant", "linear", "cosine", "step", "periodic"):
            raise ValueError(f"unknown schedule kind {self.kind!r}; known: constant, linear, cosine, step, periodic")
        if self.warmup < 0 or self.decay < 0 or self.period < 1:
            raise ValueError(f"schedule {self}: warmup and decay must be >= 0 and period >= 1")

    @classmethod
    def parse(cls, value) -> Schedule:
        """A number, a mapping of the fields above, or a Schedule."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return cls("constant", peak=float(value))
        return build(cls, value, "schedule")

    def __call__(self, step: int) -> float:
        if self.kind == "constant":
            return self.peak
        if self.kind == "step":
            return self.peak if step < self.decay else self.valley
        if self.kind == "periodic":
            return self.peak if step % self.period == 0 else self.valley
        if step < self.warmup:
            return self.peak * step / self.warmup
        done = min(1.0, (step - self.warmup) / self.decay) if self.decay else 1.0
        share = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.valley + (self.peak - self.valley) * share
