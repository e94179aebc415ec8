"""SRFT: supervised and reinforcement terms in a single stage, weighted by the policy's entropy.

    L = L_SFT^demo + L_RL^demo + L_RL^self
    L_SFT^demo = sg[0.5 exp(-H)] E_demo[ -log pi(y*) ]
    L_RL^demo  = - E_demo[ p_t A ],    A over rollouts and demonstration;
                 behaviour probability 1, no clip
    L_RL^self  = sg[0.1 exp(+H)] E_{right}[ -log pi(y) ] + E_{wrong}[ +log pi(y) ],
                 corrected as grpo's where rollouts may be older than the learner

Source: arXiv 2506.19767. Rollouts ignore their advantage: right ones are pushed up with weight 0.1
e^H, wrong ones down with weight 1, without a bound. Both halves of the self term share one mean
over all rollouts: they are the expectation of -R log pi with R = +-1, taken apart. Rewards are read
as right (> 0) or wrong. No `policy` and no `demos` options: the terms are the method's own, the
SFT weight e^-H in any other method is `demos: entropy_nll`. UNVERIFIED: the
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
from tandem.algorithms.parts.objectives.correction import token_correction
from tandem.algorithms.parts.objectives.entropy import EntropyBonus
from tandem.algorithms.parts.objectives.nll import EntropyWeightedNLL, ExpertRatio, SelfReinforce
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.parts.variants import check_variant, variant_option
from tandem.algorithms.rows import expert_row, policy_row, with_demonstration
from tandem.engine.core.types import Row, ScoredGroup

ENTROPY = frozenset({"entropy"})


@dataclass
class SRFT(Method):
    title: ClassVar[str] = "SFT and RL on demonstrations and own samples, weighted by entropy"
    paper: ClassVar[str] = "2506.19767"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    variant: str = variant_option()  # paper | code, which is no public code: see above
    sft_scale: Schedule = Schedule(peak=0.5)
    self_scale: Schedule = Schedule(peak=0.1)
    level: str | None = None  # of H: sequence | token; None: sequence as paper, token as code
    reduction: str = "token_mean"

    def __post_init__(self):
        check_variant(self.variant)
        code = self.variant == "code"
        self.entropy_level = self.level or ("token" if code else "sequence")
        if self.entropy_level not in ("sequence", "token"):
            raise ValueError(f"level is {self.entropy_level!r}; known: sequence, token")
        Reduction(self.reduction)
        self.sign = 1.0 if code else -1.0
        self.gamma = 0.1 if code else None
        self.entropy_bonus = 0.001 if code else 0.0

    def rows(self, batch: Batch) -> list[Row]:
        rows = []
        for group in batch.groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                rows.append(policy_row(trajectory, 1.0 if reward > 0 else -1.0, "self"))
            with_demo = with_demonstration(group, group.demonstration_reward)
            if with_demo is not group:
                rows.append(demonstration_row(with_demo))
        if not self.entropy_bonus:
            return rows
        return [row.with_term("entropy", row.trained.astype(np.float32)) for row in rows]

    def terms(self, batch: Batch) -> list[Term]:
        reduction = Reduction(self.reduction)
        self_scale = self.self_scale(batch.step, batch.signals)
        sft_scale = self.sft_scale(batch.step, batch.signals)
        correction = token_correction(batch.off_policy)
        own = SelfReinforce(self_scale, self.entropy_level)
        sft = EntropyWeightedNLL(sft_scale, self.sign, self.entropy_level)
        terms = [
            Term("self", own, reduction, correction=correction, needs=ENTROPY),
            Term("demo_sft", sft, reduction, needs=ENTROPY),
            Term("demo_rl", ExpertRatio(self.gamma), reduction),
        ]
        if self.entropy_bonus:
            bonus = self.entropy_bonus
            terms.append(Term("entropy", EntropyBonus(), reduction, bonus, needs=ENTROPY))
        return terms


def demonstration_row(group: ScoredGroup) -> Row:
    """The last trajectory of a group, its demonstration, in both terms on demonstrations."""
    advantage = grpo([group.rewards])[0][-1]
    row = expert_row(group.trajectories[-1], "demo_sft")
    mask = row.weights["demo_sft"]
    row = replace(row, group=group.group).with_streams(advantage=mask * advantage)
    return row.with_term("demo_rl", mask.copy())
