"""LUFFY: the demonstration joins its prompt's group of rollouts, with a shaped importance ratio instead of a clip.

    J = (1/Z) [ sum_{i on} sum_t CLIP(rho_it, A_i) + sum_{j demo} sum_t f(p_jt) A_j ],     f(p) = p/(p + gamma), gamma = 0.1
    A over rollouts and demonstration together; the demonstration's reward comes from the verifier; Z = all tokens of both

Source: arXiv 2504.14945. The behaviour probability of expert tokens is taken as 1. A prompt with a demonstration gets samples - 1 rollouts, so a group
keeps its size. When every rollout is right the demonstration's advantage is 0: its influence fades without a schedule.
Paper and code: both train without the division by std (paper text). as=code divides the sum by a constant, the response limit `length` (8192 there) and not by
the number of rows, drops the clip, and adds an entropy bonus of 0.001 over all tokens (the paper says 0.01).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term, demonstration, expert_row
from tandem.algorithms.objectives import BySource, ExpertRatio
from tandem.algorithms.policy import PolicyLoss, sampled_tokens
from tandem.engine.types import Row


@dataclass
class LUFFY(Method):
    title: ClassVar[str] = "demonstrations inside the rollout group, shaped ratio p/(p + 0.1)"
    paper: ClassVar[str] = "2504.14945"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    as_: str = "paper"                  # paper | code
    gamma: float | None = 0.1           # None: plain ratio p, the ablation without shaping
    length: int | None = None           # as=code: the constant the sum is divided by
    policy: PolicyLoss = field(default_factory=lambda: PolicyLoss.parse({"advantage": "dr_grpo"}))

    def __post_init__(self):
        if self.as_ not in ("paper", "code") or (self.as_ == "code") != (self.length is not None):
            raise ValueError(f"as is {self.as_!r} with length {self.length}: as=code needs a length (the response limit), as=paper takes none")
        base = {"advantage": "dr_grpo"} if self.as_ == "paper" else {
            "advantage": "dr_grpo", "clip_low": math.inf, "clip_high": math.inf, "reduction": "constant", "reduction_length": self.length, "entropy_bonus": 0.001}
        self.policy = PolicyLoss.parse({**base, **self.policy} if isinstance(self.policy, dict) else base if self.as_ == "code" else self.policy)

    def request(self, group, prompt, sampling, step, budget):
        samples = budget.samples if prompt.demonstration is None else max(1, budget.samples - 1)
        return super().request(group, prompt, sampling, step, replace(budget, samples=samples))

    def rows(self, batch: Batch) -> list[Row]:
        rewards, lengths = [], []
        for g in batch.groups:
            demo = g.demonstration_reward is not None
            rewards.append(np.append(g.rewards, g.demonstration_reward) if demo else g.rewards)
            lengths.append(np.array([sampled_tokens(t) for t in g.trajectories] + ([len(g.prompt.demonstration)] if demo else [])))
        rows = []
        for g, advantages in zip(batch.groups, self.policy.estimate(rewards, lengths)):
            rows += [self.policy.row(t, a) for t, a in zip(g.trajectories, advantages)]
            if g.demonstration_reward is not None:
                row = expert_row(demonstration(g), "policy")
                for name in self.policy.regularisers():
                    row.weights[name] = row.weights["policy"]
                rows.append(replace(row, advantage=row.weights["policy"] * advantages[-1], group=g.group))
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        first, *others = self.policy.terms(batch)
        return [replace(first, objective=BySource(first.objective, ExpertRatio(self.gamma))), *others]
