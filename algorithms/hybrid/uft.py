"""UFT: rollouts start from a hint of the demonstration that shrinks over training, and the hint
itself is learnt with a small weight.

    L    = L_GRPO(continuation) + beta RED{ k3(pi || pi_ref) } + beta TOK_hint{ -log p_t }
    hint = the first l of n = min(5, tokens) segments,  l ~ Binomial(n, p(t)),
           boundaries at round(k/n |y*|)
    p(t) = p_low + (p_high - p_low)(1 + cos(pi (t + 1)/T))/2 for t < T, 0 afterwards
    beta = 0.001,  p_low 0.05,  p_high 0.95,  T = 300

Source: arXiv 2505.16984; schedule, segments and coefficients as in the authors' code. UNVERIFIED:
the paper's typography of the objective (its beta is on the sum over hint tokens, the code's on
their mean), and whether the paper cuts hints by tokens or by segments as the code does. All
rollouts of a prompt share the hint, so its loss is computed once per prompt, over all prompts of
the step. One token at least is left to the model. The draw depends on (run seed, group). Training
rewards are inflated by hints; evaluation has none. `p` is any schedule, read at t + 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rl_method import RLMethod
from tandem.engine.core.types import Row, Source


@dataclass
class UFT(RLMethod):
    title: ClassVar[str] = "rollouts continue a hint that anneals away"
    paper: ClassVar[str] = "2505.16984"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    demos_term: ClassVar[str] = "hint"
    needs_groups: ClassVar[bool] = False  # the hint is learnt with any number of samples

    p: Schedule | None = None  # None: the cosine above
    hint_steps: int = 300  # T: no hints from this step on
    segments: int = 5
    hint_coefficient: Schedule = Schedule(peak=0.001)
    demos: DemoLoss = DemoLoss()  # of the hint's tokens

    def __post_init__(self):
        super().__post_init__()
        cosine = Schedule("cosine", peak=0.95, valley=0.05, decay=self.hint_steps)
        self.hint_p = self.p or cosine
        is_probability = self.hint_p.within(0.0, 1.0)
        if not is_probability or self.segments < 1:
            raise ValueError(
                f"p is {self.hint_p} and segments is {self.segments}; p is a probability, and "
                "there must be at least one segment"
            )
        self.signals: Mapping[str, float] = {}

    def policy_defaults(self):
        return {"kl": 0.001}

    def commit(self, step, demand, signals):
        self.signals = signals  # what the hints of this step's requests go by

    def probability(self, step: int) -> float:
        if step >= self.hint_steps:
            return 0.0
        return self.hint_p(step + 1, self.signals)

    def hint_length(self, step: int, demonstration: int, seed) -> int:
        """Tokens, of a demonstration of that many."""
        n = min(self.segments, demonstration)
        generator = np.random.default_rng(seed)
        taken = int(generator.binomial(n, self.probability(step)))
        length = round(taken / n * demonstration)
        return min(length, demonstration - 1)

    def request(self, group, prompt, sampling, step, budget):
        request = super().request(group, prompt, sampling, step, budget)
        if prompt.demonstration is None:
            return request
        seed = [budget.seed, group]
        length = self.hint_length(step, len(prompt.demonstration), seed)
        length = min(length, sampling.max_tokens - 1)
        if length <= 0:
            return request
        hint = prompt.demonstration[:length]
        hints = (hint,) * budget.samples
        return replace(request, prefixes=hints, prefix_source=Source.HINT)

    def rows(self, batch: Batch) -> list[Row]:
        rows = []
        seen = set()
        for row in self.policy.rows(batch.groups):
            hint = row.source == Source.HINT
            if hint.any() and row.group not in seen:
                seen.add(row.group)
                weight = hint.astype(np.float32)
                row = row.with_term("hint", weight)
                row = self.demos.with_bonus(row, "hint")
            rows.append(row)
        return rows

    def terms(self, batch: Batch) -> list[Term]:
        coefficient = self.hint_coefficient(batch.step, batch.signals)
        hint = self.demos.terms("hint", batch, coefficient)
        return [*self.policy.terms(batch), *hint]

    def metrics(self, step):
        return {"hint_p": self.probability(step)}

    def state_dict(self) -> dict[str, Any]:
        return {"signals": dict(self.signals)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.signals = dict(state["signals"])
