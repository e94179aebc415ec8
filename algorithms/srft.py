"""SRFT: supervised and reinforcement terms in a single stage, weighted by the policy's entropy.

    L = L_SFT^demo + L_RL^demo + L_RL^self
    L_SFT^demo = sg[0.5 exp(-H)] E_demo[ -log pi(y*) ]
    L_RL^demo  = - E_demo[ p_t A ]                                A over rollouts and demonstration; behaviour probability 1, no clip
    L_RL^self  = sg[0.1 exp(+H)] E_{right}[ -log pi(y) ] + E_{wrong}[ +log pi(y) ]

Source: arXiv 2506.19767. Rollouts ignore their advantage: right ones are pushed up with weight 0.1 e^H, wrong ones down with weight 1.
UNVERIFIED: the level of H and the reductions, which the paper does not give. Default: H is the row's mean token entropy, all terms token means (`level`,
`reduction`). Paper and code: the authors' code is said to use exp(+H), per token, in the SFT weight; as=code does. Rewards are read as right (> 0) or wrong.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.advantages import grpo
from tandem.algorithms.base import Batch, Method, Term, demonstration, expert_row, policy_row
from tandem.algorithms.objectives import EntropyWeightedNLL, ExpertRatio, SelfReinforce
from tandem.algorithms.reductions import Reduction
from tandem.engine.types import Row

ENTROPY = frozenset({"entropy"})


@dataclass
class SRFT(Method):
    title: ClassVar[str] = "SFT and RL on demonstrations and own samples, weighted by entropy"
    paper: ClassVar[str] = "2506.19767"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    as_: str = "paper"              # paper: exp(-H) per row | code: exp(+H) per token, in the SFT weight
    sft_scale: float = 0.5
    self_scale: float = 0.1
    level: str = "sequence"         # of H: sequence | token
    reduction: str = "token_mean"

    def __post_init__(self):
        if self.as_ not in ("paper", "code") or self.level not in ("sequence", "token"):
            raise ValueError(f"as is {self.as_!r} (paper | code), level is {self.level!r} (sequence | token)")
        Reduction(self.reduction)

    def rows(self, batch: Batch) -> list[Row]:
        rows = []
        for g in batch.groups:
            rows += [policy_row(t, 1.0 if r > 0 else -1.0, "self") for t, r in zip(g.trajectories, g.rewards)]
            if g.demonstration_reward is not None:
                (advantages,) = grpo([np.append(g.rewards, g.demonstration_reward)])
                row = expert_row(demonstration(g), "demo_sft")
                row.weights["demo_rl"] = row.weights["demo_sft"]
                rows.append(replace(row, advantage=row.weights["demo_rl"] * advantages[-1], group=g.group))
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        reduction = Reduction(self.reduction)
        sft = EntropyWeightedNLL(self.sft_scale, -1.0, self.level) if self.as_ == "paper" else EntropyWeightedNLL(self.sft_scale, 1.0, "token")
        return [Term("self", SelfReinforce(self.self_scale, self.level), reduction, needs=ENTROPY), Term("demo_sft", sft, reduction, needs=ENTROPY),
                Term("demo_rl", ExpertRatio(gamma=None), reduction)]
