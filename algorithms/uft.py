"""UFT: rollouts start from a hint of the demonstration that shrinks over training, and the hint itself is learnt with a small weight.

    L = L_GRPO(continuation) + beta RED{ k3(pi || pi_ref) } + beta TOK_hint{ -log p_t },        beta = 0.001
    hint = the first l of n_seg = min(5, tokens) segments,  l ~ Binomial(n_seg, p(t)),  boundaries at round(k/n_seg |y*|)
    p(t) = p_low + (p_high - p_low)(1 + cos(pi (t + 1)/T))/2 for t < T, 0 afterwards;   p_low 0.05, p_high 0.95, T = 300

Source: arXiv 2505.16984; schedule, segments and coefficients as in the authors' code (the paper's typography of the objective: UNVERIFIED). All rollouts of a
prompt share the hint, so its loss is computed once per prompt. Training rewards are inflated by hints; evaluation has none.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.objectives import NLL
from tandem.algorithms.policy import PolicyLoss
from tandem.engine.types import Row, Source


@dataclass
class UFT(Method):
    title: ClassVar[str] = "rollouts continue a hint that anneals away"
    paper: ClassVar[str] = "2505.16984"
    uses_experts: ClassVar[bool] = True
    aligned: ClassVar[bool] = True

    p_low: float = 0.05
    p_high: float = 0.95
    hint_steps: int = 300               # T
    segments: int = 5
    hint_coefficient: float = 0.001
    policy: PolicyLoss = field(default_factory=lambda: PolicyLoss(kl=0.001))

    def __post_init__(self):
        self.policy = PolicyLoss.parse({"kl": 0.001, **self.policy} if isinstance(self.policy, dict) else self.policy)

    def p(self, step: int) -> float:
        if step >= self.hint_steps:
            return 0.0
        return self.p_low + (self.p_high - self.p_low) * 0.5 * (1.0 + math.cos(math.pi * (step + 1) / self.hint_steps))

    def hint_length(self, group: int, step: int, demonstration: int) -> int:
        """Tokens of the hint; at least one token is left for the model to write."""
        n = min(self.segments, demonstration)
        taken = int(np.random.default_rng([group, step]).binomial(n, self.p(step)))
        return min(round(taken / n * demonstration), demonstration - 1)

    def request(self, group, prompt, sampling, step, budget):
        request = super().request(group, prompt, sampling, step, budget)
        length = 0 if prompt.demonstration is None else self.hint_length(group, step, len(prompt.demonstration))
        if length <= 0:
            return request
        return replace(request, prefixes=(prompt.demonstration[:length],) * budget.samples, prefix_source=Source.HINT)

    def accept(self, group):
        return self.policy.accept(group)

    def rows(self, batch: Batch) -> list[Row]:
        rows = self.policy.rows(batch)
        seen = set()
        for row in rows:
            hint = (row.source == Source.HINT).astype(np.float32)
            if hint.any() and row.group not in seen:
                seen.add(row.group)
                row.weights["hint"] = hint
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        return [*self.policy.terms(batch), Term("hint", NLL(), coefficient=self.hint_coefficient)]

    def metrics(self, step):
        return {"hint_p": self.p(step)}
