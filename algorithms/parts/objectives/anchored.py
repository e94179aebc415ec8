"""Anchored SFT: a weighted likelihood that is held near the reference by the KL over the whole
vocabulary.

    L = TOK{ -sg[w_t] log p_t + coefficient KL(pi_ref(.|s_t) || pi(.|s_t)) },    w_t = p_t or 1
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.config.names import REFERENCE
from tandem.engine.core.text import closest
from tandem.engine.model.quantities import Divergence, Quantity

WEIGHTS = ("p", "one")
KL = "kl_from_reference"


@dataclass(frozen=True)
class Anchored:
    """Source: Anchored SFT, row 16 of the catalogue, and the authors' code: the direction is from
    the reference to the policy, both parts stand on the same tokens and denominator. Its modes:
    weight p is asft (with coefficient 0 dft), weight one is sft+kl.

    coefficient: the authors' README has 0.05, which is the default here, their script 0.1.
    """

    coefficient: float = 0.05
    weight: str = "p"

    def __post_init__(self):
        if self.coefficient < 0:
            raise ValueError(
                f"objective anchored: coefficient is {self.coefficient}, must be at least 0"
            )
        if self.weight not in WEIGHTS:
            raise ValueError(
                f"objective anchored: weight is {self.weight!r}{closest(self.weight, WEIGHTS)}; "
                f"known: {', '.join(WEIGHTS)}"
            )

    @property
    def quantities(self) -> Mapping[str, Quantity]:
        if self.coefficient == 0:
            return {}
        return {KL: Divergence(REFERENCE, beta=0.0)}

    def __call__(self, tokens: Tokens):
        loss, metrics = NLL(self.weight)(tokens)
        if self.coefficient == 0:
            return loss, metrics
        kl = tokens[KL]
        return loss + self.coefficient * kl, {**metrics, KL: kl.detach()}
