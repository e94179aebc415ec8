"""Objectives on demonstrations that are functions of the token's probability p alone, with the
gradient that belongs to them: the family f(p) of "Beyond Log Likelihood", and DFT, which is one of
it.

    f_alpha(p) = (1 - p^alpha)/alpha      the gradient is p^alpha times that of -log p

alpha 0 is -log p, alpha 1 is 1 - p, whose gradient is DFT's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.tokens import Before, Tokens
from tandem.engine.core.text import closest


@dataclass(frozen=True)
class DFT:
    """-sg[p] log p: what the model finds unlikely is hardly pushed.

    Source: arXiv 2508.05629 and the authors' code, a mean over the valid tokens, not over the sum
    of weights. The gradient is that of -p. Their recipe: learning rate 5e-5 up to 7B, batch 256, 1
    epoch (UNVERIFIED: from memory of the paper).
    """

    def __call__(self, tokens: Tokens):
        return NLL("p")(tokens)


@dataclass(frozen=True)
class Power:
    """f_alpha(p) = (1 - p^alpha)/alpha, without a stop-gradient.

    Source: "Beyond Log Likelihood", row 3 of the catalogue, and the authors' code. Where the
    model's mean p on the data is above 0.5 (mathematics) they advise alpha 1 or 10, below 0.1 alpha
    0 (NLL). Their -p^10 is alpha 10 times 10: here the 1/alpha of the formula stays, so a token of
    p = 1 weighs the same for every alpha. Their recipe: learning rate 5e-5, batch 256, 1 epoch.
    """

    alpha: float = 1.0

    def __post_init__(self):
        if not self.alpha >= 0.0:
            raise ValueError(f"objective power: alpha is {self.alpha}, must be at least 0")

    def __call__(self, tokens: Tokens):
        return power_loss(tokens.logp, self.alpha), {"p": tokens.logp.detach().exp()}


@dataclass(frozen=True)
class Thresholded:
    """f_alpha(p) on the tokens whose probability before the update is at least `threshold` (keep:
    top), or at most (keep: bottom). The others are no part of the term: the denominator counts the
    kept ones.

    Source: "Beyond Log Likelihood", row 3 of the catalogue: alpha 1 is its top-p and bottom-p,
    alpha 0 its top-logp and bottom-logp; threshold 0.2 is its example. In the code p is that of the
    very forward that trains. Here it is looked up before the update, at the same weights, since Z
    is counted once over all ranks: one more forward over the demonstrations. With several updates
    per batch of rollouts the choice is that before the first.
    """

    keep: str = "top"
    threshold: float = 0.2
    alpha: float = 1.0

    def __post_init__(self):
        if self.keep not in ("top", "bottom"):
            raise ValueError(
                f"objective thresholded: keep is {self.keep!r}"
                f"{closest(self.keep, ('top', 'bottom'))}; known: top, bottom"
            )
        if not 0.0 <= self.threshold <= 1.0:
            raise ValueError(
                f"objective thresholded: threshold is {self.threshold}; it is a probability, "
                "within [0, 1]"
            )
        Power(self.alpha)

    def weigh(self, rows: Sequence[Before]) -> list[np.ndarray]:
        """1 on the kept tokens, float32 [n] per row."""
        bound = np.float32(self.threshold)
        kept = []
        for row in rows:
            p = np.exp(row.logp)
            kept.append((p >= bound if self.keep == "top" else p <= bound).astype(np.float32))
        return kept

    def __call__(self, tokens: Tokens):
        return Power(self.alpha)(tokens)


def power_loss(logp: Tensor, alpha: float) -> Tensor:
    return -logp if alpha == 0.0 else -torch.expm1(alpha * logp) / alpha
