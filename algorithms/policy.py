"""The RL half of a method: which advantage, token objective, reduction and regularisers, and what is done about rollouts that are off-policy.

    L = RED{ objective(rho_t, A_i) } + kl RED{ k3(pi || pi_ref) } - entropy_bonus RED{ h_t }

`policy:` in a config is a preset name, or a mapping of the fields below, with `preset` to start from. Every hybrid takes the same options.

preset                  source              advantage               objective       reduction
grpo                    arXiv 2402.03300    (R - mean)/std          clip 0.2/0.2    token_mean; the paper: kl 0.04, seq_mean_token_mean
dr_grpo                 arXiv 2503.20783    R - mean                clip 0.2/0.2    sum_over_constant, give `reduction_length` (the response limit)
dapo                    arXiv 2503.14476    (R - mean)/std          clip 0.2/0.28   token_mean; groups without spread are redrawn
rloo                    arXiv 2402.14740    leave one out           reinforce       seq_mean_token_sum
reinforce_pp            arXiv 2501.03262    R whitened              clip 0.2/0.2    token_mean
reinforce_pp_baseline   arXiv 2501.03262    R - mean, whitened      clip 0.2/0.2    token_mean
gspo                    arXiv 2507.18071    (R - mean)/std          gspo            seq_mean_token_mean
cispo                   arXiv 2506.13585    (R - mean)/std          cispo           token_mean
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tandem.algorithms.advantages import ESTIMATORS
from tandem.algorithms.base import Batch, Term, policy_row
from tandem.algorithms.objectives import CISPO, GSPO, EntropyBonus, KLToReference, PPOClip, Reinforce, RolloutCorrection
from tandem.algorithms.options import build
from tandem.algorithms.reductions import Reduction
from tandem.engine.config import closest
from tandem.engine.types import Finish, Row, ScoredGroup, Source, Trajectory

PRESETS: dict[str, dict] = {
    "grpo": {},
    "dr_grpo": {"advantage": "dr_grpo", "reduction": "sum_over_constant"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": True},
    "rloo": {"advantage": "rloo", "objective": "reinforce", "reduction": "seq_mean_token_sum"},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"},
    "gspo": {"objective": "gspo", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "seq_mean_token_mean"},
    "cispo": {"objective": "cispo"},
}


@dataclass
class PolicyLoss:
    """Options of the RL half."""

    advantage: str = "grpo"             # algorithms/advantages.py
    objective: str = "ppo"              # ppo | gspo | cispo | reinforce
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: str = "token_mean"
    reduction_length: int | None = None
    kl: float = 0.0                     # beta; > 0 loads a frozen reference model
    entropy_bonus: float = 0.0
    dynamic_sampling: bool = False      # redraw groups whose rewards are all equal (DAPO)
    mask_truncated: bool = False        # do not train on responses cut at max_tokens (DAPO's overlong filtering)
    correction: str = "auto"            # auto (token TIS where rollouts may be stale) | none | token | sequence
    correction_mode: str = "truncate"   # truncate (TIS) | mask (IcePop, MIS)
    correction_cap: float = 2.0

    def __post_init__(self):
        check("advantage", self.advantage, ESTIMATORS)
        check("objective", self.objective, ("ppo", "gspo", "cispo", "reinforce"))
        check("correction", self.correction, ("auto", "none", "token", "sequence"))
        check("correction_mode", self.correction_mode, ("truncate", "mask"))
        Reduction(self.reduction, self.reduction_length)    # fails here, not in step 1

    @classmethod
    def parse(cls, value) -> PolicyLoss:
        """A preset name, a mapping of options with an optional `preset`, or a PolicyLoss."""
        if isinstance(value, cls):
            return value
        options = {"preset": value} if isinstance(value, str) else dict(value)
        preset = options.pop("preset", "grpo")
        check("preset", preset, PRESETS)
        return build(cls, {**PRESETS[preset], **options}, "policy")

    def accept(self, group: ScoredGroup) -> bool:
        return not self.dynamic_sampling or bool(np.ptp(group.rewards) > 0)

    def estimate(self, rewards, lengths) -> list[np.ndarray]:
        return ESTIMATORS[self.advantage](rewards, lengths)

    def advantages(self, groups) -> list[np.ndarray]:
        """float32 [n] per group, from the rewards of its rollouts."""
        return self.estimate([g.rewards for g in groups], [np.array([sampled_tokens(t) for t in g.trajectories]) for g in groups])

    def row(self, trajectory: Trajectory, advantage: float) -> Row:
        """A rollout as a row of the policy term, and of the regularisers that are on."""
        row = policy_row(trajectory, advantage, "policy")
        if self.mask_truncated and trajectory.finish == Finish.LENGTH:
            row.weights["policy"][:] = 0
        for name in self.regularisers():
            row.weights[name] = row.weights["policy"]
        return row

    def rows(self, batch: Batch) -> list[Row]:
        return [self.row(t, a) for g, advantages in zip(batch.groups, self.advantages(batch.groups)) for t, a in zip(g.trajectories, advantages)]

    def regularisers(self) -> list[str]:
        return [name for name, on in (("kl", self.kl), ("entropy", self.entropy_bonus)) if on]

    def token_objective(self):
        if self.objective == "ppo":
            return PPOClip(self.clip_low, self.clip_high, self.dual_clip)
        return {"gspo": GSPO(self.clip_low, self.clip_high), "cispo": CISPO(self.clip_low, self.clip_high), "reinforce": Reinforce()}[self.objective]

    def terms(self, batch: Batch, coefficient: float = 1.0) -> list[Term]:
        reduction = Reduction(self.reduction, self.reduction_length)
        level = ("token" if batch.off_policy else "none") if self.correction == "auto" else self.correction
        correction = None if level == "none" else RolloutCorrection(level, self.correction_mode, self.correction_cap)
        terms = [Term("policy", self.token_objective(), reduction, coefficient, correction)]
        if self.kl:
            terms.append(Term("kl", KLToReference(), reduction, coefficient * self.kl, needs=frozenset({"ref_logp"})))
        if self.entropy_bonus:
            terms.append(Term("entropy", EntropyBonus(), reduction, coefficient * self.entropy_bonus, needs=frozenset({"entropy"})))
        return terms


def sampled_tokens(trajectory: Trajectory) -> int:
    return int((trajectory.source == Source.POLICY).sum())


def check(option: str, value, known) -> None:
    if value not in known:
        raise ValueError(f"policy.{option} is {value!r}{closest(value, known)}; known: {', '.join(known)}")
