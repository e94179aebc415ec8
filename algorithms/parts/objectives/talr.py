"""TALR: demonstrations weighted by p^(1/tau), at a temperature that follows the data's own loss.

    w_t = sg[ max( p_t^(1/tau), floor ) ],    L = TOK_demo{ -w_t log p_t }
    tau = median over the step's demonstrations of their mean -log p

The weights without the floor, scaled to sum to 1, minimise sum_t w_t l_t + tau sum_t w_t log w_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.tokens import Before, Tokens

SMALLEST = 1e-6  # of p and of tau


@dataclass(frozen=True)
class TALR:
    """-w log p with w from before the update: one more forward over the demonstrations, since tau
    is a number of the whole step.

    Source: "SFT Doesn't Always Hurt General Capabilities", row 52 of the catalogue: the theory from
    the paper, floor 0.01 and the smallest p and tau (1e-6) from an independent port. UNVERIFIED:
    the authors' own constants. The paper's first advice is a small learning rate (1e-6, not 5e-6 to
    2e-5). With several updates per batch of rollouts the weights are those before the first.
    """

    tau: float | None = None  # None: the median above; 1 with floor 0 is DFT
    floor: float = 0.01

    def __post_init__(self):
        if self.tau is not None and not self.tau > 0.0:
            raise ValueError(f"objective talr: tau is {self.tau}, must be above 0")
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"objective talr: floor is {self.floor}, must be within [0, 1]")

    def weigh(self, rows: Sequence[Before]) -> list[np.ndarray]:
        """w, float32 [n] per row."""
        tau = self.tau
        if tau is None:
            tau = max(float(np.median([-row.logp.mean() for row in rows])), SMALLEST)
        weights = []
        for row in rows:
            power = np.exp(np.maximum(row.logp, np.log(SMALLEST)) / tau)
            weights.append(np.maximum(power, self.floor).astype(np.float32))
        return weights

    def __call__(self, tokens: Tokens):
        return NLL()(tokens)
