"""SRFT: supervised and reinforcement terms in a single stage, weighted by the policy's entropy.

    L = L_SFT^demo + L_RL^demo + L_RL^self
    L_SFT^demo = sg[0.5 exp(-H)] E_demo[ -log pi(y*) ]
    L_RL^demo  = - E_demo[ p_t A ]                                A over rollouts and demonstration; behaviour probability 1, no clip
    L_RL^self  = sg[0.1 exp(+H)] E_{right}[ -log pi(y) ] + E_{wrong}[ +log pi(y) ]

Source: arXiv 2506.19767. Rollouts ignore their advantage: right ones are pushed up with weight 0.1
e^H, wrong ones down with weight 1, without a bound. Both halves of the self term share one mean
over all rollouts: they are the expectation of -R log pi with R = +-1, taken apart. Rewards are read
as right (> 0) or wrong. No `policy` options: the self term is the method's own. UNVERIFIED: the
level of H and the reductions, which the paper does not give (default: H is the row's mean token
entropy, all terms are token means; options `level`, `reduction`). `as: code` equals no public code;
do not report it as the authors'. It is put together from two second-hand sources: H of the token
itself, exp(+H) in the SFT weight and an entropy bonus of 0.001 are known from notes on the authors'
code alone; LUFFY's shaping p/(p + 0.1) in place of p is from the re-implementation in HPT's
repository, which otherwise differs (exp(-H) with H per row, no std, policy sums over 8192). Use
`as: paper` to compare with SRFT.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.advantages import grpo
from tandem.algorithms.parts.objectives.entropy import EntropyBonus
from tandem.algorithms.parts.objectives.nll import EntropyWeightedNLL, ExpertRatio, SelfReinforce
from tandem.algorithms.parts.policy import variant
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rows import expert_row, policy_row, with_demonstration
from tandem.engine.core.types import Row

ENTROPY = frozenset({"entropy"})


@dataclass
class SRFT(Method):
    title: ClassVar[str] = "SFT and RL on demonstrations and own samples, weighted by entropy"
    paper: ClassVar[str] = "2506.19767"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    as_: str = "paper"  # paper | code, which is no public code: see above
    sft_scale: Schedule | float = 0.5
    self_scale: Schedule | float = 0.1
    level: str | None = None  # of H: sequence | token; None: sequence as paper, token as code
    reduction: str = "token_mean"

    def __post_init__(self):
        self.sft_scale, self.self_scale = (
            Schedule.parse(self.sft_scale),
            Schedule.parse(self.self_scale),
        )
        level, self.sign, self.gamma, self.entropy_bonus = variant(
            self.as_, ("sequence", -1.0, None, 0.0), ("token", 1.0, 0.1, 0.001)
        )
        self.level = self.level or level
        if self.level not in ("sequence", "token"):
            raise ValueError(f"level is {self.level!r}; known: sequence, token")
        Reduction(self.reduction)

    def rows(self, batch: Batch) -> list[Row]:
        rows = []
        for group in batch.groups:
            own = [
                policy_row(t, 1.0 if r > 0 else -1.0, "self")
                for t, r in zip(group.trajectories, group.rewards, strict=True)
            ]
            united, demos = with_demonstration(group, group.demonstration_reward), []
            if united is not group:
                ((*_, advantage),) = grpo([united.rewards])
                row = expert_row(united.trajectories[-1], "demo_sft")
                mask = row.weights["demo_sft"]
                row = replace(row, advantage=mask * advantage, group=group.group)
                demos = [row.with_term("demo_rl", mask.copy())]
            rows += own + demos
        if not self.entropy_bonus:
            return rows
        return [row.with_term("entropy", row.trained.astype(np.float32)) for row in rows]

    def terms(self, batch: Batch) -> list[Term]:
        reduction, now = (
            Reduction(self.reduction),
            lambda schedule: schedule(batch.step, batch.signals),
        )
        terms = [
            Term("self", SelfReinforce(now(self.self_scale), self.level), reduction, needs=ENTROPY),
            Term(
                "demo_sft",
                EntropyWeightedNLL(now(self.sft_scale), self.sign, self.level),
                reduction,
                needs=ENTROPY,
            ),
            Term("demo_rl", ExpertRatio(self.gamma), reduction),
        ]
        return terms + (
            [Term("entropy", EntropyBonus(), reduction, self.entropy_bonus, needs=ENTROPY)]
            if self.entropy_bonus
            else []
        )
