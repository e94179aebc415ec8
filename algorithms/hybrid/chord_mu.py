"""CHORD-mu: one loss that mixes on-policy RL with off-policy expert data, by a global coefficient
mu. Its sibling CHORD-phi also weighs every expert token.

    L     = (1 - mu) L_GRPO + mu L_SFT        mu in [0, 1], a function of the step: 0.9 -> 0.05
    L_SFT = - TOK_demo{ log p_t }

Source: arXiv 2508.11408. Rollout and expert tokens have denominators of their own; prompts of the
two streams need not match.

Defaults: decay over 200 steps (math; the paper's tool-use runs take 30), the schedule as in the
authors' code (half cosine). The paper's adaptive variant mu = max(0, tau - mean reward) is
`mu: {kind: reward_gap, peak: 0.5}`, one step late: it reads the reward of the step before.

Paper and code: the code averages token means of micro-batches weighted by rows, which is the
paper's token mean only for rows of equal length; this file does the paper's. `demos` puts another
objective in the place of -log p, `token_weight` stays a factor on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.algorithms.base import Batch, Demand
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rl_method import RLMethod


@dataclass
class ChordMu(RLMethod):
    title: ClassVar[str] = "CHORD-mu: (1 - mu) GRPO + mu SFT, mu decaying"
    paper: ClassVar[str] = "2508.11408"
    uses_experts: ClassVar[bool] = True

    mu: Schedule = Schedule("cosine", peak=0.9, valley=0.05, decay=200)
    token_weight: Literal["one", "p", "phi"] = "one"  # p is SFT-IS, which the paper rejects
    demos: DemoLoss = DemoLoss()

    def __post_init__(self):
        super().__post_init__()
        if not self.mu.within(0.0, 1.0):
            raise ValueError(
                f"mu goes from {self.mu.peak} to {self.mu.valley}; "
                "it must stay within [0, 1], since RL is weighted by 1 - mu"
            )
        self.reported_mu = self.mu(0)

    def demand(self, step, budget, signals):
        # at mu = 1 no rollouts are needed, at mu = 0 no demonstrations
        mu = self.mu(step, signals)
        return Demand(
            prompts=budget.prompts if mu < 1.0 or self.mu.adaptive else 0,
            experts=budget.experts if mu > 0.0 else 0,
        )

    def rows(self, batch: Batch):
        self.reported_mu = self.mu(batch.step, batch.signals)
        return self.policy.rows(batch.groups) + [self.demos.row(t, "expert") for t in batch.experts]

    def terms(self, batch: Batch):
        mu = self.mu(batch.step, batch.signals)
        expert = self.demos.terms("expert", batch, mu, weight=self.token_weight)
        return [*self.policy.terms(batch, 1.0 - mu), *expert]

    def metrics(self, step):
        return {"mu": self.reported_mu}
