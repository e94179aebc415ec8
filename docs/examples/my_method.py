"""Focal mix: GRPO plus SFT on demonstrations, where an expert token weighs (1 - p)^k: what the
model knows already is left alone.

    L = (1 - mu) L_GRPO - mu TOK_demo{ sg[(1 - p_t)^k] log p_t }
"""

from dataclasses import dataclass
from typing import ClassVar

from tandem import RLMethod, Schedule, Term, expert_row


@dataclass(frozen=True)
class FocalNLL:
    k: float

    def __call__(self, tokens):
        p = tokens.logp.detach().exp()
        # a loss per token, and what to report of it
        return -((1 - p) ** self.k) * tokens.logp, {"p": p}


@dataclass
class FocalMix(RLMethod):  # its `policy` is the whole RL family as options
    title: ClassVar[str] = "GRPO + SFT weighted by (1 - p)^k"
    uses_experts: ClassVar[bool] = True

    mu: Schedule = Schedule(peak=0.2)  # in a config a number, or any schedule
    k: float = 2.0

    def rows(self, batch):
        return self.policy.rows(batch.groups) + [expert_row(t, "expert") for t in batch.experts]

    def terms(self, batch):
        mu = self.mu(batch.step, batch.signals)
        return [*self.policy.terms(batch, 1 - mu), Term("expert", FocalNLL(self.k), coefficient=mu)]
