"""Demonstrations as a teacher reads them: a divergence to it over the whole vocabulary at each of
their tokens, in the place of the likelihood or beside it.

    L = TOK{ JSD_beta(pi_teacher(.|s_t), pi(.|s_t)) - nll log p_t }
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.model.quantities import Divergence, Quantity

TO_TEACHER = "divergence_to_teacher"


@dataclass(frozen=True)
class Distilled:
    """Source: supervised distillation, gkd with own 0 (arXiv 2306.13649); beta 0 is the forward KL
    of word-level knowledge distillation. `model` is a name in models:.
    """

    model: str = "teacher"
    beta: float = 0.0
    nll: float = 0.0

    def __post_init__(self):
        if not 0 <= self.beta <= 1 or self.nll < 0:
            raise ValueError(
                f"objective distilled: beta is {self.beta} and nll is {self.nll}; beta must be "
                "from 0 to 1 and nll at least 0"
            )

    @property
    def quantities(self) -> Mapping[str, Quantity]:
        return {TO_TEACHER: Divergence(self.model, self.beta)}

    def __call__(self, tokens: Tokens):
        found = tokens[TO_TEACHER]
        return found - self.nll * tokens.logp, {TO_TEACHER: found.detach()}
