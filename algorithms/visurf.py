"""ViSurf: the ground truth joins the group as one more response, under three reward controls. Here for text.

    group = { o_1 .. o_G } + { y };   A = (R - mean)/std over the G + 1;   L = -(1/(G+1)) [ sum_j CLIP(rho_j, A_j) + CLIP(rho_y, A_y) ]
    rho_y = pi(y)/pi_old(y) with the learner's own pi_old, so 1 on the first update: the gradient is RLVR + A_y SFT

Source: arXiv 2510.10606. Controls of the reward of y:
  1. y is written the way the model writes: `align` names a function (y ids, rollout ids) -> y ids for that; default: as the dataset has it, through the
     model's own chat template.
  2. y earns nothing for a format it does not have: `reward` sets R(y) by hand, e.g. to the weight of the answer reward alone.
  3. Smoothing: if a rollout does as well as y (within `tolerance`), R(y) = mean of the rollouts, so that A_y = 0.
UNVERIFIED: token or sequence reduction inside CLIP; default: mean of sequence means, as GRPO published.
"""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, demonstration, expert_row, load_object
from tandem.algorithms.policy import PolicyLoss, sampled_tokens
from tandem.engine.types import Row, ScoredGroup


@dataclass
class ViSurf(Method):
    title: ClassVar[str] = "the ground truth as one more response of the group, its reward controlled"
    paper: ClassVar[str] = "2510.10606"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    smoothing: bool = True
    tolerance: float = 1e-6
    reward: float | None = None         # of y; None: what the reward functions say
    align: str | None = None            # file.py:function
    policy: PolicyLoss = field(default_factory=lambda: PolicyLoss(reduction="seq_mean_token_mean"))

    def __post_init__(self):
        self.policy = PolicyLoss.parse({"reduction": "seq_mean_token_mean", **self.policy} if isinstance(self.policy, dict) else self.policy)
        self.aligner = load_object(self.align, "method.align") if self.align else None
        self.smoothed = 0.0

    def controlled(self, group: ScoredGroup) -> float:
        """R(y) after the controls."""
        own = group.demonstration_reward if self.reward is None else self.reward
        if self.smoothing and group.rewards.max() >= own - self.tolerance:
            return float(group.rewards.mean())
        return own

    def rows(self, batch: Batch) -> list[Row]:
        withy = [g for g in batch.groups if g.demonstration_reward is not None]
        controlled = {g.group: self.controlled(g) for g in withy}
        self.smoothed = float(np.mean([controlled[g.group] == float(g.rewards.mean()) for g in withy])) if withy else 0.0
        rewards = [np.append(g.rewards, controlled[g.group]) if g.group in controlled else g.rewards for g in batch.groups]
        lengths = [np.array([sampled_tokens(t) for t in g.trajectories] + ([len(g.prompt.demonstration)] if g.group in controlled else [])) for g in batch.groups]
        rows = []
        for g, advantages in zip(batch.groups, self.policy.estimate(rewards, lengths)):
            rows += [self.policy.row(t, a) for t, a in zip(g.trajectories, advantages)]
            if g.group in controlled:
                if self.aligner:
                    y = self.aligner(g.prompt.demonstration, [t.response for t in g.trajectories])
                    g = replace(g, prompt=replace(g.prompt, demonstration=np.asarray(y, np.int32)))
                row = expert_row(demonstration(g), "policy")
                rows.append(replace(row, advantage=row.weights["policy"] * advantages[-1], group=g.group))
        return rows

    def terms(self, batch: Batch):
        return self.policy.terms(batch)

    def metrics(self, step):
        return {"smoothed": self.smoothed}
