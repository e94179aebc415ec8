"""SDFT, self-distillation: own samples held to what a model finds likely that was shown the
demonstration, by default the model that the run starts from.

    y ~ pi(.|x),    q(y_t) = pi_teacher(y_t | c(x), y<t),    c(x) = x and the demonstration
    divergence      L = TOK{ JSD_beta(q, pi) } over the whole vocabulary, as in gkd
    sampled         OPD with A = -coefficient d, d_t = sg[ log pi(y_t) - log q(y_t) ]

The teacher reads the same response ids behind another prompt (`Row.views`). A live teacher
(`policy`) has every policy that ignores c as a fixed point; `models: {slow: {kind: ema}}` is one
between.

Source: arXiv 2601.19897 and TRL's SDFTTrainer: beta .5, the start weights as teacher; TRL takes the
student's top 100 tokens and renormalises, here it is the whole vocabulary. arXiv 2601.18734 (OPSD)
is the same with the reference solution as c, `template` for its instruction and the start weights
as teacher. UNVERIFIED: both papers' text, the wording of `template` (ours). Not here: OPSD's clip
of each summand (a pseudo-loss, whose step may increase the KL), the teacher's own rationale. A row
whose c(x) is longer than data.max_prompt_tokens, or without a demonstration, trains nothing;
`teacher/rows` is the share of the others. No `demos`: demonstrations are shown, not trained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch
from tandem.algorithms.distillation.opd import OPD
from tandem.algorithms.parts.hints import with_hint
from tandem.algorithms.parts.teachers import DIVERGENCE, Measured
from tandem.engine.config.names import AT, REFERENCE
from tandem.engine.core.types import Codec, Row, ScoredGroup
from tandem.engine.model.quantities import Divergence

VIEW = "informed"


@dataclass
class SDFT(OPD):
    title: ClassVar[str] = "self-distillation: the teacher is shown the demonstration"
    paper: ClassVar[str] = "2601.19897"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True

    teacher: str = REFERENCE
    form: str = "divergence"  # or sampled
    beta: float = 0.5
    template: str = "\n\nA response to this:\n{hint}\n\nNow answer with a response of your own.\n"

    def __post_init__(self):
        super().__post_init__()
        if self.form not in ("divergence", "sampled"):
            raise ValueError(f"form is {self.form!r}; known: divergence, sampled")
        if self.form == "divergence" and (self.rewards or self.clip_d is not None):
            raise ValueError("rewards and clip_d are for form sampled, which has advantages")
        if "{hint}" not in self.template:
            raise ValueError(f"template is {self.template!r}, expected a text with {{hint}} in it")

    @property
    def seen(self) -> str:
        return f"{self.teacher}{AT}{VIEW}"

    def rows(self, batch: Batch):
        codec = batch.budget.codec
        assert codec is not None, "prompts that come with demonstrations are read from a dataset"
        views = {group.group: self.view(group, codec) for group in batch.groups}
        return [informed(row, views[row.group]) for row in super().rows(batch)]

    def view(self, group: ScoredGroup, codec: Codec) -> np.ndarray | None:
        """c(x); None where there is none, or it is too long."""
        if group.prompt.demonstration is None:
            return None
        text = codec.decode(group.prompt.demonstration)
        return codec.encode(with_hint(group.prompt.content, self.template, text))

    def terms(self, batch: Batch):
        if self.form == "sampled":
            return super().terms(batch)
        first, *others = self.policy.terms(batch)
        quantities = {DIVERGENCE: Divergence(self.seen, self.beta)}
        factor = first.coefficient * self.coefficient(batch.step, batch.signals)
        first = replace(first, objective=Measured(), correction=None, coefficient=factor)
        return [replace(first, quantities=quantities), *others]

    def credit(self, rows, batch: Batch):
        if self.form == "sampled":
            return super().credit(rows, batch)
        return super(OPD, self).credit(rows, batch)


def informed(row: Row, view: np.ndarray | None) -> Row:
    """The row with its view; without one it trains nothing."""
    if view is not None:
        return replace(row, views={VIEW: view})
    return replace(row, weights={term: np.zeros_like(mask) for term, mask in row.weights.items()})
