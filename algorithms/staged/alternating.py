"""Alternating SFT and RL: every k-th step trains on demonstrations, all others on rollouts.

    L(t) = L_SFT if t % every == 0 else L_GRPO

Source: "uniform" interleaving, the ablation of ReLIFT with an SFT step every 8 steps (arXiv
2506.07527: 49.1 against 52.6 for ReLIFT itself). ReLIFT keeps separate optimizer moments for the
two kinds of step (`separate_moments: true`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch, Demand, Method
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.rl.grpo import GRPO
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.sft.sft import SFT


@dataclass
class Alternating(RLMethod):
    title: ClassVar[str] = "an SFT step every k steps, GRPO steps between"
    paper: ClassVar[str] = "2506.07527"
    uses_experts: ClassVar[bool] = True
    demos_term: ClassVar[str] = "sft"

    every: int = 8
    sft_learning_rate: float | None = None
    separate_moments: bool = True
    demos: DemoLoss = DemoLoss()

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"every is {self.every}, must be at least 1 (1 = SFT only)")
        super().__post_init__()
        self.sft, self.rl = SFT(demos=self.demos), GRPO(policy=self.policy)

    def stage(self, step: int) -> Method:
        return self.sft if step % self.every == 0 else self.rl

    def demand(self, step, budget, signals):
        if step % self.every == 0:
            return Demand(
                experts=budget.experts,
                learning_rate=self.sft_learning_rate,
                optimizer="sft" if self.separate_moments else "main",
            )
        return Demand(prompts=budget.prompts)

    def rows(self, batch: Batch):
        return self.stage(batch.step).rows(batch)

    def terms(self, batch: Batch):
        return self.stage(batch.step).terms(batch)
