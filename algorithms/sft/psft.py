"""Proximal SFT: several updates on a batch of demonstrations, held near the policy before them.

    L   = - TOK_demo{ min(r_t, clip(r_t, 1 - clip_low, 1 + clip_high)) }
    r_t = p_t / (p_t before the first update of the batch)

PPO with advantage 1 on expert tokens. A step takes `updates` optimizer steps, each on its own part
of the batch; in the first r = 1 and the gradient is SFT's. Only the upper clip acts: a token whose
probability has risen by more than clip_high is left alone, one that fell keeps its gradient.

Source: arXiv 2508.17784; code zwhong714/PSFT (verl). Bounds 0.2 and 0.28 and batches of 64 in 8
updates are the code's; the paper writes one epsilon. The code's dual clip is for negative
advantages, which there are none of. No `demos`: as the SFT half of other methods this objective is
`demos: proximal`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from tandem.algorithms.base import Batch, Budget, Demand, Method, Term
from tandem.algorithms.parts.objectives.proximal import ClippedRatio
from tandem.algorithms.rows import expert_row


@dataclass
class PSFT(Method):
    title: ClassVar[str] = "proximal SFT: several updates per batch, the ratio clipped as in PPO"
    paper: ClassVar[str] = "2508.17784"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    updates: int = 8  # optimizer steps per batch of demonstrations
    clip_low: float = 0.2
    clip_high: float = 0.28

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        return replace(super().demand(step, budget, signals), updates=self.updates)

    def rows(self, batch: Batch):
        return [expert_row(t, "sft") for t in batch.experts]

    def terms(self, batch: Batch):
        return [Term("sft", ClippedRatio(self.clip_low, self.clip_high))]
