"""GRPO: group-relative policy optimisation on the model's own samples.

    L = - RED_roll{ min( rho_t A_i , clip(rho_t, 1 - eps_l, 1 + eps_h) A_i ) } + beta * RED_roll{ k3(pi || pi_ref) }
    A_i = (R_i - mean_group) / (std_group + 1e-6)

Source: arXiv 2402.03300 (eq. 3, 4). Defaults: eps 0.2 (PPO); beta 0 and RED = token_mean, the present practice (DAPO, arXiv 2503.14476), where the
paper has beta 0.04 and a mean of sequence means (`reduction: seq_mean_token_mean`). With one update per batch of rollouts rho is 1 and the clip inert.
Rollouts that may be older than the learner are corrected by truncated importance sampling (`correction: auto`).
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tandem.algorithms.advantages import ESTIMATORS
from tandem.algorithms.base import Batch, Method, Term, policy_row
from tandem.algorithms.objectives import KLToReference, PPOClip, RolloutCorrection
from tandem.algorithms.options import build
from tandem.algorithms.reductions import Reduction
from tandem.engine.types import Row


@dataclass
class PolicyLoss:
    """The RL half of a method: which advantage, clip, reduction, KL and rollout correction."""

    advantage: str = "grpo"             # grpo | dr_grpo | rloo
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: str = "token_mean"
    reduction_length: int | None = None
    kl: float = 0.0                     # beta; > 0 loads a frozen reference model
    correction: str = "auto"            # auto (token TIS where rollouts may be stale) | none | token | sequence
    correction_mode: str = "truncate"   # truncate (TIS) | mask
    correction_cap: float = 2.0

    def __post_init__(self):
        if self.advantage not in ESTIMATORS:
            raise ValueError(f"policy.advantage is {self.advantage!r}; known: {', '.join(ESTIMATORS)}")
        if self.correction not in ("auto", "none", "token", "sequence"):
            raise ValueError(f"policy.correction is {self.correction!r}; known: auto, none, token, sequence")
        Reduction(self.reduction, self.reduction_length)    # fails here, not in step 1

    @classmethod
    def parse(cls, value) -> PolicyLoss:
        return build(cls, value, "policy")

    def rows(self, batch: Batch) -> list[Row]:
        """One row per rollout; the KL term, where there is one, covers the same tokens."""
        estimate = ESTIMATORS[self.advantage]
        rows = [policy_row(t, a, "policy") for g in batch.groups for t, a in zip(g.trajectories, estimate(g.rewards))]
        for row in rows if self.kl else ():
            row.weights["kl"] = row.weights["policy"]
        return rows

    def terms(self, batch: Batch, coefficient: float = 1.0) -> list[Term]:
        reduction = Reduction(self.reduction, self.reduction_length)
        level = ("token" if batch.off_policy else "none") if self.correction == "auto" else self.correction
        correction = None if level == "none" else RolloutCorrection(level, self.correction_mode, self.correction_cap)
        terms = [Term("policy", PPOClip(self.clip_low, self.clip_high, self.dual_clip), reduction, coefficient, correction)]
        if self.kl:
            terms.append(Term("kl", KLToReference(), reduction, coefficient * self.kl, needs=frozenset({"ref_logp"})))
        return terms


@dataclass
class GRPO(Method):
    title: ClassVar[str] = "group-relative policy optimisation on own samples"
    paper: ClassVar[str] = "2402.03300"

    policy: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self):
        self.policy = PolicyLoss.parse(self.policy)

    def rows(self, batch: Batch):
        return self.policy.rows(batch)

    def terms(self, batch: Batch):
        return self.policy.terms(batch)
