"""DMT, dual-stage mixed fine-tuning: special abilities first, then general ones with a replay.

    stage 1, special_steps steps:   L = L_SFT on the source `special`
    stage 2:                        L = L_SFT on `general` and share * N_special rows of `special`

An epoch of stage 2 is the N rows of `general` and K = round(share * N_special) of `special`, spread
evenly: of its first x rows, floor(x K / (N + K)) are replayed. Both sources go on where they were,
so that later epochs replay other rows; the paper draws its part once.

`special` and `general` are names of sources: data.experts is "experts", others stand in
data.sources. Each stage has optimizer moments, and a warm-up, of its own.

Source: arXiv 2310.05492, read through notes; share 1/256 is the paper's best. UNVERIFIED: epochs
of each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Budget, Demand
from tandem.algorithms.sft.sft import SFT


@dataclass
class DMT(SFT):
    title: ClassVar[str] = "SFT on one source, then on another with a replay of the first"
    paper: ClassVar[str] = "2310.05492"

    special: str = "experts"
    general: str = "general"
    special_steps: int = 100
    share: float = 1 / 256  # of the rows of `special` in an epoch of the second stage

    def __post_init__(self):
        if self.special == self.general:
            raise ValueError(f"special and general are one source, {self.special!r}")
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}, must be from 0 to 1")

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        batch = budget.experts
        if step < self.special_steps:
            experts = {self.special: batch, self.general: 0}
            return Demand(experts=experts, optimizer="special")
        done = (step - self.special_steps) * batch
        replayed = self.replayed(done + batch, budget) - self.replayed(done, budget)
        return Demand(experts={self.general: batch - replayed, self.special: replayed})

    def replayed(self, rows: int, budget: Budget) -> int:
        """How many of the first `rows` rows of the second stage are of `special`."""
        again = round(self.share * budget.sources.get(self.special, 0))
        epoch = budget.sources.get(self.general, 0) + again
        return rows * again // max(epoch, 1)
