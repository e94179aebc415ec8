"""SFT->RL: demonstrations first, then GRPO, two stages in one run.

    L(t) = L_SFT for t < sft_steps, L_GRPO afterwards        (mu(t) = 1[t < S] in CHORD's notation)

The baseline that a hybrid has to beat: tuned, it beat every single-stage hybrid of the audit arXiv
2604.23747. Each stage has its own learning rate (they differ by 5x to 50x in published recipes),
and the RL stage starts from fresh optimizer moments. A KL term holds it near the end of the first
stage.
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
class SFTThenRL(RLMethod):
    title: ClassVar[str] = "SFT, then GRPO: the two-stage baseline"
    paper: ClassVar[str] = "2604.23747"
    uses_experts: ClassVar[bool] = True
    demos_term: ClassVar[str] = "sft"

    sft_steps: int = 100
    sft_learning_rate: float | None = None  # None: learner.learning_rate for both stages
    demos: DemoLoss = DemoLoss()

    def __post_init__(self):
        super().__post_init__()
        self.sft, self.rl = SFT(demos=self.demos), GRPO(policy=self.policy)

    def stage(self, step: int) -> Method:
        return self.sft if step < self.sft_steps else self.rl

    def demand(self, step, budget, signals):
        if step < self.sft_steps:
            return Demand(
                experts=budget.experts,
                learning_rate=self.sft_learning_rate,
                optimizer="sft",
            )
        return Demand(
            prompts=budget.prompts,
            set_reference=step == self.sft_steps and self.policy.uses_reference,
        )

    def rows(self, batch: Batch):
        return self.stage(batch.step).rows(batch)

    def terms(self, batch: Batch):
        return self.stage(batch.step).terms(batch)
