"""GKD, generalised knowledge distillation: the policy held to a teacher over the whole vocabulary,
on demonstrations and on its own samples.

    y   with probability `own` ~ pi(.|x), else the demonstration of another x
    L   = TOK{ JSD_beta(pi_teacher(.|x, y<t), pi(.|x, y<t)) }
    JSD = beta KL(pi_teacher || m) + (1 - beta) KL(pi || m),    m = beta pi_teacher + (1 - beta) pi

beta 0 is KL(pi_teacher || pi) and beta 1 KL(pi || pi_teacher); they are not the limits of JSD_beta,
which go to 0 at both ends. The teacher is detached, and so is the choice of y: there is no policy
gradient.

Source: arXiv 2306.13649 and TRL's GKDTrainer: own .5, beta .5. There the coin is drawn once per
micro-batch, by each process; here once per row of the step, `data.experts_per_step` of them, from
the run's seed and the step. TRL's temperature .9 is for sampling alone; here it divides the logits
of both too, and the gradient shrinks with its square. UNVERIFIED: the paper's reduction. The paper
draws one set of x for both: let data.prompts and data.experts name the same rows. Not here:
sequence-level samples of the teacher. No `demos`: the divergence is what trains them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Budget, Demand, Method, Term
from tandem.algorithms.parts.teachers import DIVERGENCE, Measured
from tandem.algorithms.rows import expert_row, policy_row
from tandem.engine.model.quantities import Divergence


@dataclass
class GKD(Method):
    title: ClassVar[str] = "JSD to a teacher on demonstrations and own samples"
    paper: ClassVar[str] = "2306.13649"
    uses_experts: ClassVar[bool] = True
    uses_rewards: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    teacher: str = "teacher"  # a name in models:
    beta: float = 0.5
    own: float = 0.5  # share of rows that are samples of the policy, lambda in the paper

    def __post_init__(self):
        for name in ("beta", "own"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be from 0 to 1")

    @property
    def compares_with(self):
        return (self.teacher,)

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        draws = np.random.default_rng([budget.seed, step]).random(budget.experts)
        own = int((draws < self.own).sum())
        return Demand(prompts=own, experts=budget.experts - own)

    def request(self, group, prompt, sampling, step, budget):
        return replace(super().request(group, prompt, sampling, step, budget), samples=1)

    def rows(self, batch: Batch):
        rows = [expert_row(trajectory, "gkd") for trajectory in batch.experts]
        for group in batch.groups:
            rows += [policy_row(trajectory, 0.0, "gkd") for trajectory in group.trajectories]
        return rows

    def terms(self, batch: Batch):
        quantity = Divergence(self.teacher, self.beta)
        return [Term("gkd", Measured(), quantities={DIVERGENCE: quantity})]
