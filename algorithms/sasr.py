"""SASR: after a warm-up of SFT, every step is SFT or GRPO by a draw whose probability follows the SFT gradient's norm.

    L_t = I_t L_SFT + (1 - I_t) L_GRPO,    I_t ~ Bernoulli(p_t),    p_t = G_last / (G_last + gamma G_warm)
    G_last: norm of the SFT gradient at the most recent SFT step;  G_warm: at the end of the warm-up

Source: arXiv 2505.13026: a per-step switch, probabilistic, driven by gradient norms; warm-up loss is the NLL summed over tokens (mean over sequences here).
UNVERIFIED: the formula of p_t, gamma, the warm-up's length; no code is public. The norm is the global one before clipping; the draw depends on (seed, step)
alone, so that all ranks and a resumed run draw the same. p_t freezes while no SFT step is drawn.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Demand, Method, Term, expert_row
from tandem.algorithms.objectives import NLL
from tandem.algorithms.policy import PolicyLoss
from tandem.algorithms.reductions import Reduction


@dataclass
class SASR(Method):
    title: ClassVar[str] = "each step SFT or GRPO, drawn by the SFT gradient's norm"
    paper: ClassVar[str] = "2505.13026"
    uses_experts: ClassVar[bool] = True

    warmup: int = 100                   # SFT steps
    gamma: float = 1.0
    seed: int = 0
    sft_reduction: str = "token_mean"   # the paper's warm-up: seq_mean_token_sum
    sft_learning_rate: float | None = None
    policy: PolicyLoss = field(default_factory=PolicyLoss)

    def __post_init__(self):
        if self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}, must be at least 1: the switch compares with the gradient norm at its end")
        self.policy = PolicyLoss.parse(self.policy)
        Reduction(self.sft_reduction)
        self.g_warm = self.g_last = 0.0

    def probability(self) -> float:
        """p_t, the chance of an SFT step."""
        scale = self.g_last + self.gamma * self.g_warm
        return self.g_last / scale if scale > 0 else 1.0

    def is_sft(self, step: int) -> bool:
        return step < self.warmup or bool(np.random.default_rng([self.seed, step]).random() < self.probability())

    def demand(self, step, budget, signals):
        if self.is_sft(step):
            return Demand(experts=budget.experts, kind="sft", learning_rate=self.sft_learning_rate)
        return Demand(prompts=budget.prompts, kind="rl")

    def accept(self, group):
        return self.policy.accept(group)

    def rows(self, batch: Batch):
        return self.policy.rows(batch) + [expert_row(t, "expert") for t in batch.experts]

    def terms(self, batch: Batch) -> list[Term]:
        return [*self.policy.terms(batch), Term("expert", NLL(), Reduction(self.sft_reduction))]

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics.get("loss/expert") is not None and metrics.get("grad_norm") is not None:
            self.g_last = float(metrics["grad_norm"])
            if step < self.warmup:
                self.g_warm = self.g_last

    def metrics(self, step):
        return {"sft_probability": self.probability()}

    def state_dict(self) -> dict[str, Any]:
        return {"g_warm": self.g_warm, "g_last": self.g_last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.g_warm, self.g_last = state["g_warm"], state["g_last"]
