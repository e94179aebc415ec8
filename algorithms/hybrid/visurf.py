"""ViSurf: the ground truth joins the group as one more response, under three reward controls. Here
for text.

    group = { o_1 .. o_G } + { y },    A = (R - mean)/std over the G + 1
    L     = -(1/(G+1)) [ sum_j CLIP(rho_j, A_j) + CLIP(rho_y, A_y) ]
    rho_y = pi(y)/pi_old(y) with the learner's own pi_old, so 1 on the first update:
            the gradient is RLVR + A_y SFT

Source: arXiv 2510.10606. Controls of the reward of y:
  1. y is written the way the model writes: `align` names a function (y ids, [rollout ids]) -> y ids
     for that; default: as the dataset has it, through the model's own chat template.
  2. y earns nothing for a format it does not have: `reward` sets R(y) by hand, e.g. to the weight
     of the answer reward alone.
  3. Smoothing: if a rollout does as well as y (within `tolerance`), R(y) = mean of the rollouts, so
     that A_y = 0.
UNVERIFIED: token or sequence reduction inside CLIP (default: mean of sequence means, as GRPO
published), group size, learning rate and steps; no code of the authors is public. The KL term of
the derivation is dropped, as in the paper's implementation. Dynamic sampling, if switched on,
judges the G rollouts and y. No `demos`: y is trained by the policy term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.rows import with_demonstration
from tandem.engine.core.loading import load_object
from tandem.engine.core.types import Row, ScoredGroup


@dataclass
class ViSurf(RLMethod):
    title: ClassVar[str] = (
        "the ground truth as one more response of the group, its reward controlled"
    )
    paper: ClassVar[str] = "2510.10606"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    smoothing: bool = True
    tolerance: float = 1e-6
    reward: float | None = None  # of y; None: what the reward functions say
    align: str | None = None  # file.py:function

    def __post_init__(self):
        super().__post_init__()
        self.aligner = load_object(self.align, "method.align") if self.align else None
        self.smoothed = 0.0

    def policy_defaults(self):
        return {"reduction": "seq_mean_token_mean"}

    def own_reward(self, group: ScoredGroup) -> float | None:
        """R(y) before smoothing; None where the group has no y."""
        if group.prompt.demonstration is None:
            return None
        return group.demonstration_reward if self.reward is None else self.reward

    def matched(self, group: ScoredGroup) -> bool:
        """Whether a rollout does as well as y, so that smoothing applies."""
        own = self.own_reward(group)
        if own is None or not self.smoothing:
            return False
        return bool(group.rewards.max(initial=-np.inf) >= own - self.tolerance)

    def with_expert(self, group: ScoredGroup) -> ScoredGroup:
        """The group with y in it, all three controls applied."""
        reward = self.own_reward(group)
        if self.matched(group):
            reward = float(group.rewards.mean(dtype=np.float64))
        if self.aligner and reward is not None:
            y = self.aligner(group.prompt.demonstration, [t.response for t in group.trajectories])
            prompt = replace(group.prompt, demonstration=np.asarray(y, np.int32))
            group = replace(group, prompt=prompt)
        return with_demonstration(group, reward)

    def accept(self, group):
        return self.policy.accept(self.with_expert(group))

    def rows(self, batch: Batch) -> list[Row]:
        matched = [self.matched(g) for g in batch.groups]
        self.smoothed = sum(matched) / max(1, len(matched))
        groups = [self.with_expert(g) for g in batch.groups]
        all_advantages = self.policy.advantages(groups)
        rows = []
        for group, same, advantages in zip(groups, matched, all_advantages, strict=True):
            if same:
                advantages[-1] = 0.0  # what the mean gives but for rounding
            pairs = zip(group.trajectories, advantages, strict=True)
            rows += [self.policy.row(trajectory, advantage) for trajectory, advantage in pairs]
        return rows

    def terms(self, batch: Batch):
        return self.policy.terms(batch)

    def metrics(self, step):
        return {"smoothed": self.smoothed}
