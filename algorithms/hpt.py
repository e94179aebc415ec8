"""HPT: per prompt, RL where the model succeeds often enough, SFT on the demonstration where it does not.

    P(q) = share of right rollouts;   L(q) = L_RL if P > gate else L_SFT
    L_RL  = -(1/n) sum_i sum_t CLIP(rho, A_i),   A = (R - mean)/std        L_SFT = - (1/|y*|) sum_t log p_t

Source: arXiv 2509.04419. gate 0 (SFT only where all rollouts fail) for Qwen, 2/8 for Llama. A prompt without a demonstration keeps its rollouts.
Paper and code: as=code has no std, no clip, the policy sum divided by the response limit `length`, SFT as a token mean, and an entropy bonus of 0.001 (there it
covers the demonstrations too; here the rollouts). The code's SFT mean is per micro-batch, so that packing changes its weight; here it is global.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term, demonstration, expert_row
from tandem.algorithms.objectives import NLL
from tandem.algorithms.policy import PolicyLoss
from tandem.algorithms.reductions import Reduction
from tandem.engine.types import Row, ScoredGroup


@dataclass
class HPT(Method):
    title: ClassVar[str] = "per prompt: RL if solved often enough, else SFT on its demonstration"
    paper: ClassVar[str] = "2509.04419"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    as_: str = "paper"
    gate: float = 0.0                   # share of right rollouts up to which a prompt goes to SFT; below 0: never
    sft_coefficient: float = 1.0        # the authors use 0.3 for Qwen2.5-Math-1.5B
    length: int | None = None           # as=code: the constant
    policy: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self):
        if self.as_ not in ("paper", "code") or (self.as_ == "code") != (self.length is not None):
            raise ValueError(f"as is {self.as_!r} with length {self.length}: as=code needs a length (the response limit), as=paper takes none")
        base = {"reduction": "seq_mean_token_sum"} if self.as_ == "paper" else {
            "advantage": "dr_grpo", "clip_low": math.inf, "clip_high": math.inf, "reduction": "constant", "reduction_length": self.length, "entropy_bonus": 0.001}
        self.policy = PolicyLoss.parse(self.policy if isinstance(self.policy, PolicyLoss) and self.policy != PolicyLoss() else
                                       {**base, **(self.policy if isinstance(self.policy, dict) else {})})
        self.counts = (0, 0)

    def gated(self, group: ScoredGroup) -> bool:
        """Integer counts, so that a gate of k/n holds exactly k right answers."""
        right = int((group.rewards > 0).sum())
        return group.prompt.demonstration is not None and right <= math.floor(self.gate * len(group.rewards) + 1e-9)

    def rows(self, batch: Batch) -> list[Row]:
        to_sft = [g for g in batch.groups if self.gated(g)]
        to_rl = tuple(g for g in batch.groups if not self.gated(g))
        self.counts = (len(to_sft), len(to_rl))
        rows = [self.policy.row(t, a) for g, advantages in zip(to_rl, self.policy.advantages(to_rl)) for t, a in zip(g.trajectories, advantages)]
        return rows + [expert_row(demonstration(g), "sft") for g in to_sft]

    def terms(self, batch: Batch) -> list[Term]:
        reduction = Reduction("seq_mean_token_mean" if self.as_ == "paper" else "token_mean")
        return [*self.policy.terms(batch), Term("sft", NLL(), reduction, self.sft_coefficient)]

    def metrics(self, step):
        return {"sft_share": self.counts[0] / max(1, sum(self.counts))}
