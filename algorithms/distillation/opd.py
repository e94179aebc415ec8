"""OPD, on-policy distillation: own samples pushed towards what a teacher finds likely, alone or
beside the rewards of any RL half.

    d_t  = sg[ log pi(y_t) - log pi_teacher(y_t) ]      pi from before the update, y_t ~ pi
    A'_t = A_t - coefficient d_t                        A = 0 without `rewards`
    L    = RED_roll{ max( -rho_t A'_t, -clip(rho_t, 1 - eps_l, 1 + eps_h) A'_t ) }

Alone, at rho = 1, that is the gradient of the sum of the tokens' KL(pi || pi_teacher) at fixed
prefixes. d enters after A was centred and scaled; whitened, its size would say nothing of the
distance to the teacher.

Source: the form of slime, miles and ms-swift; with rewards KDRL, arXiv 2506.02208, UNVERIFIED: its
estimator (recalled: k2 as a loss), schedule and masks. Defaults: coefficient 1, no clip of d, which
are slime's; verl and Thinking Machines' code take other places for both (their own clipped term;
the sampler's log-probs). d is unbiased only for samples at the run's one temperature with top_p 1.
With several updates per batch d stays that of before the first, and pulls towards the teacher and
away from the sampler. Responses cut at max_tokens are trained, unless `policy: {mask_truncated:
true}`. One sample per prompt is enough without rewards.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.parts.teachers import less_distance, teacher_diagnostics
from tandem.algorithms.rl_method import RLMethod
from tandem.engine.config.names import logp_of


@dataclass
class OPD(RLMethod):
    title: ClassVar[str] = "distillation on own samples: a teacher's log-probs as advantages"
    paper: ClassVar[str] = "2506.02208"
    uses_rewards: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    teacher: str = "teacher"  # a name in models:
    coefficient: Schedule = Schedule(peak=1.0)
    clip_d: float | None = None  # d within [-clip_d, clip_d]
    rewards: bool = False  # A from the rewards, as `policy` says, in the place of 0

    def __post_init__(self):
        super().__post_init__()
        if self.clip_d is not None and not self.clip_d > 0:
            raise ValueError(f"clip_d is {self.clip_d}, must be above 0")
        if self.policy.dynamic_sampling and not self.rewards:
            raise ValueError("policy.dynamic_sampling would drop all groups: rewards is false")

    @property
    def compares_with(self):
        return (self.teacher,)

    @property
    def seen(self) -> str:
        """The teacher, and the view behind which it is asked if there is one."""
        return self.teacher

    def rows(self, batch: Batch):
        groups = batch.groups
        if not self.rewards:
            groups = [replace(g, rewards=np.zeros_like(g.rewards)) for g in groups]
        return self.policy.rows(groups)

    def terms(self, batch: Batch):
        terms = self.policy.terms(batch)
        if self.coefficient(batch.step, batch.signals) == 0:
            return terms
        needs = terms[0].needs | {"old_logp", logp_of(self.seen)}
        return [replace(terms[0], needs=needs), *terms[1:]]

    def credit(self, rows, batch: Batch):
        rows = super().credit(rows, batch)
        coefficient = self.coefficient(batch.step, batch.signals)
        if coefficient == 0:
            return rows
        return less_distance(rows, "policy", self.seen, coefficient, self.clip_d)

    def diagnostics(self, rows):
        found = teacher_diagnostics(rows, "policy", self.seen, self.clip_d)
        return {**super().diagnostics(rows), **found}
