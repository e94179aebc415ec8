"""LUFFY: the demonstration joins its prompt's group of rollouts, with a shaped importance ratio
instead of a clip.

    J    = (1/Z) [ sum_{i on} sum_t CLIP(rho_it, A_i) + sum_{j demo} sum_t f(p_jt) A_j ]
    f(p) = p/(p + gamma), gamma = 0.1;    Z = all tokens of both
    A over rollouts and demonstration together; the demonstration's reward comes from the verifier

Source: arXiv 2504.14945. The behaviour probability of expert tokens is taken as 1, so that the
ratio is p and the gradient goes through f: a token weighs A gamma p/(p + gamma)^2. A prompt with a
demonstration gets samples - 1 rollouts, so a group keeps its size. When every rollout is right the
demonstration's advantage is 0: its influence fades without a schedule. Dynamic sampling, if
switched on, judges the group with its demonstration. Paper and code: both train without the
division by std (the paper's text, against its formula), with an entropy bonus over the tokens of
both sources: 0.01 in the paper, 0.001 in the code. as=code also drops the clip and divides the sum
by a constant, the response limit (8192 there), not by tokens or rows: give it as `policy:
{reduction_length: 8192}`; the entropy bonus stays a mean over tokens. How the two weigh against
each other depends on the GPUs and micro-batches of the authors' machine: `code_gpus` and
`code_micro_batches`, see algorithms/parts/policy.py. Watch policy/expert/p, the mean probability of
demonstration tokens. No `demos`: the shaped ratio is what trains the demonstration.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.objectives.nll import BySource, ExpertRatio
from tandem.algorithms.parts.variants import select, variant_option
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.rows import with_demonstration
from tandem.engine.core.types import Row


@dataclass
class LUFFY(RLMethod):
    title: ClassVar[str] = "demonstrations inside the rollout group, shaped ratio p/(p + 0.1)"
    paper: ClassVar[str] = "2504.14945"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    scores_demonstrations: ClassVar[bool] = True

    variant: str = variant_option()  # paper | code
    gamma: float | None = 0.1  # None: plain ratio p, the ablation without shaping

    def policy_defaults(self):
        paper = {"advantage": "dr_grpo", "entropy_bonus": 0.01}
        return select(self.variant, paper, code={"preset": "luffy_code"})

    def request(self, group, prompt, sampling, step, budget):
        samples = budget.samples if prompt.demonstration is None else max(1, budget.samples - 1)
        return super().request(group, prompt, sampling, step, replace(budget, samples=samples))

    def accept(self, group):
        return self.policy.accept(with_demonstration(group, group.demonstration_reward))

    def rows(self, batch: Batch) -> list[Row]:
        groups = [with_demonstration(g, g.demonstration_reward) for g in batch.groups]
        rows = self.policy.rows(groups)
        if "entropy" not in self.policy.regularisers():
            return rows
        # over expert tokens as well
        return [row.with_term("entropy", row.weights["policy"].copy()) for row in rows]

    def terms(self, batch: Batch) -> list[Term]:
        first, *others = self.policy.terms(batch)
        both = BySource(first.objective, ExpertRatio(self.gamma))
        return [replace(first, objective=both), *others]
