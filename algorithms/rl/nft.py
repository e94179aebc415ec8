"""NFT, negative-aware fine-tuning: likelihood on right samples, and on wrong ones the likelihood of
the policy that would be left if the right ones were taken away.

    R_t = pi/pi_old,    r = share of right samples of the group, clamped to [0.02, 0.98]
    right   -log R_t
    wrong   -negative_weight log max( (1 - r R_t)/(1 - r), floor )
    L = TOK{ w(r) loss_t },    w = 1, or 1 - r, or sqrt((1 - r)/r)   (normalize none, linear, std)

Source: arXiv 2505.18116 and the authors' code. The max is straight-through there and here: its
value is clamped, its gradient is not. At R = 1 with normalize std the weights on grad log pi are
GRPO's advantages (population std). Groups that are all right or all wrong are left out.

pi_old is the policy that sampled. With `rollout.staleness: 0` that is the policy before the step's
updates, scored by the learner, so R = 1 in the first. Where samples may be older (staleness, a
replay) it is the log-prob that the rollout engine gave, with its rounding, and R tells from the
first update on how far the policy has moved since.

Paper and code: the code sums tokens / 1000 over a micro-batch's rows, here the step's token mean.
UNVERIFIED: the paper's own constants; negative_weight 1 and floor 0.05 are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.tokens import Tokens, clamped_exp
from tandem.algorithms.rows import policy_row

TERM = "policy"
LEAST = 0.02  # of r, from either end


@dataclass(frozen=True)
class NegativeAware:
    negative_weight: float
    floor: float

    def __call__(self, tokens: Tokens):
        log_ratio = tokens.logp - tokens.old
        ratio = clamped_exp(log_ratio)
        success = tokens["success"]
        left = (1.0 - success * ratio) / (1.0 - success)
        clamped = left.detach().clamp(min=self.floor)
        left = left + (clamped - left.detach())
        right = tokens["right"] > 0
        wrong_loss = -self.negative_weight * left.log()
        loss = torch.where(right, -log_ratio, wrong_loss)
        return tokens["scale"] * loss, {"ratio": ratio.detach(), "right": right.float()}


@dataclass
class NFT(Method):
    title: ClassVar[str] = "likelihood of right samples, and of what is left without wrong ones"
    paper: ClassVar[str] = "2505.18116"

    normalize: Literal["none", "linear", "std"] = "std"
    correct: float = 1.0  # a sample with at least this reward is right
    negative_weight: float = 1.0
    floor: float = 0.05

    def __post_init__(self):
        if not 0.0 < self.floor <= 1.0:
            raise ValueError(f"floor is {self.floor}, must be in (0, 1]")

    def rows(self, batch: Batch):
        rows = []
        for group in batch.groups:
            right = group.rewards >= self.correct
            if right.all() or not right.any():
                continue
            success = float(np.clip(right.mean(), LEAST, 1.0 - LEAST))
            for trajectory, is_right in zip(group.trajectories, right, strict=True):
                row = policy_row(trajectory, 0.0, TERM)
                row = row.with_streams(success=success, scale=self.scale(success), advantage=None)
                if batch.off_policy:
                    row = row.with_streams(old_logp=trajectory.behaviour_logp)
                rows.append(row.with_streams(right=float(is_right)))
        return rows

    def scale(self, success: float) -> float:
        if self.normalize == "linear":
            return 1.0 - success
        if self.normalize == "std":
            return float(np.sqrt((1.0 - success) / success))
        return 1.0

    def terms(self, batch: Batch):
        needs = frozenset({"success", "right", "scale"})
        return [Term(TERM, NegativeAware(self.negative_weight, self.floor), needs=needs)]
