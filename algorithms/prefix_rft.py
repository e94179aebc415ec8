"""Prefix-RFT: one rollout of every group starts from a prefix of the demonstration, and the whole sequence is trained by RL.

    group of N = N - 1 plain rollouts + 1 hybrid  y = [ y*_1 .. y*_L , continuation ~ pi ],    L = floor(l |y*|),  l ~ U(low(t), high)
    L = -(1/Z) sum_i sum_t CLIP(rho_it, A_i),    A over all N; on prefix tokens only the top 20 % by entropy are pushed, the others count with A = 0

Source: arXiv 2507.01679 (v3), authors' code for constants: high = 0.95, low falls from 0.95 to 0 by a cosine (default over 500 steps: UNVERIFIED).
log pi_old on prefix tokens is the learner's own; rollout correction does not apply to them. The prefix is cut on token ids and never holds the whole
response. Paper and code: the code takes the entropy quantile within each micro-batch; here it is within each row, which no packing can change.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.objectives import PrefixSelected
from tandem.algorithms.policy import PolicyLoss
from tandem.algorithms.schedules import Schedule
from tandem.engine.types import Row, Source


@dataclass
class PrefixRFT(Method):
    title: ClassVar[str] = "one rollout per group continues a demonstration's prefix"
    paper: ClassVar[str] = "2507.01679"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    low: Schedule = field(default_factory=lambda: Schedule("cosine", peak=0.95, valley=0.0, decay=500))
    high: float = 0.95
    keep: float = 0.2               # share of prefix tokens that are pushed
    policy: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self):
        self.low, self.policy = Schedule.parse(self.low), PolicyLoss.parse(self.policy)
        if not 0.0 <= self.keep <= 1.0 or not 0.0 <= self.high <= 1.0:
            raise ValueError(f"keep is {self.keep} and high is {self.high}; both are shares in [0, 1]")

    def prefix_length(self, group: int, step: int, demonstration: int) -> int:
        """Drawn from the group's ordinal, so that every rank, engine and resumed run draws the same."""
        low = min(self.low(step), self.high)
        share = low + (self.high - low) * np.random.default_rng([group, step]).random()
        return min(int(share * demonstration), demonstration - 1)

    def request(self, group, prompt, sampling, step, budget):
        request = super().request(group, prompt, sampling, step, budget)
        length = 0 if prompt.demonstration is None else self.prefix_length(group, step, len(prompt.demonstration))
        if length <= 0:
            return request
        none = np.zeros(0, np.int32)
        return replace(request, prefixes=(none,) * (budget.samples - 1) + (prompt.demonstration[:length],), prefix_source=Source.PREFIX)

    def accept(self, group):
        return self.policy.accept(group)

    def rows(self, batch: Batch) -> list[Row]:
        rows = []
        for g, advantages in zip(batch.groups, self.policy.advantages(batch.groups)):
            for t, a in zip(g.trajectories, advantages):
                row, prefix = self.policy.row(t, a), (t.source == Source.PREFIX).astype(np.float32)
                row.weights["policy"] += prefix
                rows.append(replace(row, advantage=row.advantage + prefix * a))
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        first, *others = self.policy.terms(batch)
        return [replace(first, objective=PrefixSelected(first.objective, self.keep), needs=first.needs | {"entropy"}), *others]
