"""SASR: after a warm-up of SFT, every step is SFT or GRPO by a draw whose probability follows the
SFT gradient's norm.

    L_t = I_t L_SFT + (1 - I_t) L_GRPO,    I_t ~ Bernoulli(p_t)
    p_t = G_last / (G_last + gamma G_warm)
    G_last: norm of the SFT gradient at the most recent SFT step;  G_warm: at the end of the warm-up

Source: arXiv 2505.13026: a per-step switch, probabilistic, driven by gradient norms; warm-up loss
is the NLL summed over tokens (`sft_reduction: seq_mean_token_sum`; the default, a token mean, keeps
the learning rate of SFT). UNVERIFIED: the formula of p_t, gamma, the warm-up's length, and how the
paper's split of samples by the group's median enters the loss (here: not at all); no code is
public. The norm is the global one before clipping. The draw depends on (run seed, step) alone, so
that all ranks and a resumed run draw the same. p_t freezes while no SFT step is drawn. The two
kinds of step share their optimizer moments. `probability` puts any schedule in p_t's place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Demand, Term
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rl_method import RLMethod


@dataclass
class SASR(RLMethod):
    title: ClassVar[str] = "each step SFT or GRPO, drawn by the SFT gradient's norm"
    paper: ClassVar[str] = "2505.13026"
    uses_experts: ClassVar[bool] = True

    warmup: int = 100  # SFT steps
    gamma: float = 1.0
    probability: Schedule | None = None  # None: the p_t above
    sft_reduction: str = "token_mean"
    sft_learning_rate: float | None = None
    demos: DemoLoss = DemoLoss()

    def __post_init__(self):
        if self.warmup < 1:
            raise ValueError(
                f"warmup is {self.warmup}, must be at least 1: the switch compares with the "
                "gradient norm at its end"
            )
        super().__post_init__()
        by_norm = Schedule("saturating", peak=1.0, signal="sft_norm_ratio", threshold=self.gamma)
        self.switch = self.probability or by_norm
        Reduction(self.sft_reduction)
        self.g_warm = 0.0
        self.g_last = 0.0
        self.next_p = 1.0
        self.signals: Mapping[str, float] = {}

    def p(self, step: int, signals: Mapping[str, float]) -> float:
        """The chance that `step` is an SFT step."""
        if step < self.warmup:
            return 1.0
        known = {**signals, **self.norm_ratio()}
        return self.switch(step, known)

    def norm_ratio(self) -> dict[str, float]:
        if self.g_warm <= 0:
            return {}
        return {"sft_norm_ratio": self.g_last / self.g_warm}

    def demand(self, step, budget, signals):
        generator = np.random.default_rng([budget.seed, step])
        draw = generator.random()
        if draw < self.p(step, signals):
            return Demand(experts=budget.experts, learning_rate=self.sft_learning_rate)
        return Demand(prompts=budget.prompts)

    def rows(self, batch: Batch):
        self.signals = batch.signals
        rows = self.policy.rows(batch.groups)
        for expert in batch.experts:
            row = self.demos.row(expert, "expert")
            rows.append(row)
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        reduction = Reduction(self.sft_reduction)
        sft = self.demos.terms("expert", batch, reduction=reduction)
        return [*self.policy.terms(batch), *sft]

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        norm = metrics.get("grad_norm", math.nan)
        if "loss/expert" in metrics and math.isfinite(norm):
            self.g_last = float(norm)
            if step < self.warmup:
                self.g_warm = self.g_last
        # an SFT step has no reward: what was known of it before
        signals = {**self.signals, **metrics}
        self.next_p = self.p(step + 1, signals)

    def metrics(self, step):
        return {"sft_probability": self.next_p, **self.norm_ratio()}

    def state_dict(self) -> dict[str, Any]:
        return {"g_warm": self.g_warm, "g_last": self.g_last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.g_warm = state["g_warm"]
        self.g_last = state["g_last"]
