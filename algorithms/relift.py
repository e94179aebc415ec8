"""ReLIFT: RL steps, and an SFT step on the hardest questions whenever enough of them have gathered.

    RL step:   L_GRPO; prompts that no rollout solved go to a buffer, with their demonstrations
    SFT step:  L = - TOK_buf{ log p_t } - alpha TOK_buf{ h_t },     as soon as the buffer holds `buffer` demonstrations; it takes that many

Source: arXiv 2506.07527; buffer 128, alpha 1e-4 (paper; the code has 1e-3). The SFT step has optimizer moments of its own.
Paper and code: the paper's RL is GRPO with std, clip and token mean; as=code has no std, no clip, divides by the response limit `length`, adds an entropy bonus
of 0.001, and takes the newest demonstrations first. The authors clip gradients at 1.0 (SFT) and 0.7 (RL); learner.grad_clip is one number for both.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tandem.algorithms.base import Batch, Demand, Method, Term, demonstration, expert_row
from tandem.algorithms.objectives import NLL, EntropyBonus
from tandem.algorithms.policy import PolicyLoss
from tandem.engine.types import Row, Trajectory


@dataclass
class ReLIFT(Method):
    title: ClassVar[str] = "RL, with SFT steps on the questions no rollout solved"
    paper: ClassVar[str] = "2506.07527"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    as_: str = "paper"
    buffer: int = 128
    alpha: float = 1e-4
    sft_learning_rate: float | None = None
    length: int | None = None           # as=code: the constant
    policy: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self):
        if self.as_ not in ("paper", "code") or (self.as_ == "code") != (self.length is not None):
            raise ValueError(f"as is {self.as_!r} with length {self.length}: as=code needs a length (the response limit), as=paper takes none")
        base = {} if self.as_ == "paper" else {"advantage": "dr_grpo", "clip_low": math.inf, "clip_high": math.inf, "reduction": "constant",
                                               "reduction_length": self.length, "entropy_bonus": 0.001}
        self.policy = PolicyLoss.parse({**base, **self.policy} if isinstance(self.policy, dict) else base if self.as_ == "code" else self.policy)
        self.waiting: list[Trajectory] = []
        self.pushed = self.consumed = 0

    def demand(self, step, budget, signals):
        if len(self.waiting) >= self.buffer:
            return Demand(kind="sft", learning_rate=self.sft_learning_rate, optimizer="sft")
        return Demand(prompts=budget.prompts, experts=budget.experts, kind="rl")

    def accept(self, group):
        return self.policy.accept(group)

    def rows(self, batch: Batch) -> list[Row]:
        if not batch.groups:
            newest_first = self.as_ == "code"
            taken = self.waiting[-self.buffer:][::-1] if newest_first else self.waiting[:self.buffer]
            self.waiting = self.waiting[:-self.buffer] if newest_first else self.waiting[self.buffer:]
            self.consumed += len(taken)
            rows = [expert_row(t, "buffer") for t in taken]
            for row in rows:
                row.weights["buffer_entropy"] = row.weights["buffer"]
            return rows
        hardest = [demonstration(g) for g in batch.groups if g.prompt.demonstration is not None and not (g.rewards > 0).any()]
        self.waiting += hardest
        self.pushed += len(hardest)
        return self.policy.rows(batch)

    def terms(self, batch: Batch) -> list[Term]:
        if batch.groups:
            return self.policy.terms(batch)
        return [Term("buffer", NLL()), Term("buffer_entropy", EntropyBonus(), coefficient=self.alpha, needs=frozenset({"entropy"}))]

    def metrics(self, step):
        return {"buffer": float(len(self.waiting)), "demonstrations_used": float(self.consumed)}

    def state_dict(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting), "pushed": self.pushed, "consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.waiting, self.pushed, self.consumed = list(state["waiting"]), state["pushed"], state["consumed"]
