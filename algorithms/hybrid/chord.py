"""CHORD: one loss that mixes on-policy RL with off-policy expert data, by a global coefficient mu
and a per-token weight phi.

    L = (1 - mu) L_GRPO + mu L_SFT                                         mu in [0, 1], a function of the step
    CHORD-mu    L_SFT = - TOK_demo{ log p_t },                             mu decays 0.9 -> 0.05
    CHORD-phi   L_SFT = - TOK_demo{ sg[p_t (1 - p_t)] log p_t },           mu = 0.1 constant

Source: arXiv 2508.11408. Rollout and expert tokens have denominators of their own; prompts of the
two streams need not match. Defaults: decay over 200 steps (math; the paper's tool-use runs take
30), the schedule as in the authors' code (half cosine). The paper's adaptive variant mu = max(0,
tau - mean reward) is `mu: {kind: reward_gap, peak: 0.5}`, one step late: it reads the reward of the
step before. Paper and code: the code averages token means of micro-batches weighted by rows, which
is the paper's token mean only for rows of equal length; this file does the paper's. phi carries no
stop-gradient in the paper's formula, both public codes detach it; so does this file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tandem.algorithms.base import Batch, Demand, Method, Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.policy import PolicyLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rows import expert_row


@dataclass
class ChordMu(Method):
    title: ClassVar[str] = "CHORD-mu: (1 - mu) GRPO + mu SFT, mu decaying"
    paper: ClassVar[str] = "2508.11408"
    uses_experts: ClassVar[bool] = True

    mu: Schedule | float = field(
        default_factory=lambda: Schedule("cosine", peak=0.9, valley=0.05, decay=200)
    )
    token_weight: str = "one"  # one | p (SFT-IS, the paper's rejected variant) | phi
    policy: PolicyLoss | dict | str = field(default_factory=dict)

    def __post_init__(self):
        self.mu, self.policy = Schedule.parse(self.mu), PolicyLoss.parse(self.policy)
        if not (0.0 <= self.mu.valley <= 1.0 and 0.0 <= self.mu.peak <= 1.0):
            raise ValueError(
                f"mu goes from {self.mu.peak} to {self.mu.valley}; it must stay within [0, "
                "1], since RL is weighted by 1 - mu"
            )
        if self.token_weight not in ("one", "p", "phi"):
            raise ValueError(f"token_weight is {self.token_weight!r}; known: one, p, phi")
        self.now = self.mu(0)

    def demand(self, step, budget, signals):
        # at the ends of the range one of the two forward passes has weight zero and is not run
        mu = self.mu(step, signals)
        return Demand(
            prompts=budget.prompts if mu < 1.0 or self.mu.adaptive else 0,
            experts=budget.experts if mu > 0.0 else 0,
        )

    def accept(self, group):
        return self.policy.accept(group)

    def rows(self, batch: Batch):
        return self.policy.rows(batch.groups) + [expert_row(t, "expert") for t in batch.experts]

    def terms(self, batch: Batch):
        self.now = self.mu(batch.step, batch.signals)
        return [
            *self.policy.terms(batch, 1.0 - self.now),
            Term("expert", NLL(self.token_weight), coefficient=self.now),
        ]

    def metrics(self, step):
        return {"mu": self.now}


@dataclass
class ChordPhi(ChordMu):
    title: ClassVar[str] = "CHORD-phi: constant mu, expert tokens weighted by p(1 - p)"

    mu: Schedule | float = 0.1
    token_weight: str = "phi"


@dataclass
class SFTIS(ChordMu):
    title: ClassVar[str] = (
        "SFT with importance sampling: CHORD's rejected variant, expert tokens weighted by p"
    )

    mu: Schedule | float = 0.1
    token_weight: str = "p"
