"""Token cleaning: only those tokens of a demonstration are trained that the model got better at
since the start of the run.

    score_t = log pi(y_t) - log pi_ref(y_t),    before the update
    L       = TOK_kept{ -log p_t },    kept: the `share` of each row's tokens with the highest score
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.tokens import Before, Tokens


@dataclass(frozen=True)
class Cleaned:
    """-log p on the kept tokens; needs the frozen reference and one more forward of the policy.

    Source: Token Cleaning, row 39 of the catalogue, and the authors' code: share 0.6 within each
    row, the script's default. It is their self-evolving form, where the model trained so far judges
    what comes next, with a part per step: they split the data into a few parts, after a warm-up on
    plain SFT (here: start from a model that had one). ssToken (row 99) with gamma 1, no attention,
    keeps the same tokens. ceil(share * tokens) are kept, of equal scores the first: in a first
    step all are equal.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})

    share: float = 0.6

    def __post_init__(self):
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"objective cleaned: share is {self.share}, must be within (0, 1]")

    def weigh(self, rows: Sequence[Before]) -> list[np.ndarray]:
        """1 on the kept tokens, float32 [n] per row."""
        weights = []
        for row in rows:
            assert row.ref_logp is not None, "a row has no ref_logp"
            order = np.argsort(row.ref_logp - row.logp, kind="stable")
            # 1e-6: 0.6 * 5 is a little more than 3 in binary
            kept = order[: math.ceil(self.share * len(order) - 1e-6)]
            weight = np.zeros(len(order), np.float32)
            weight[kept] = 1.0
            weights.append(weight)
        return weights

    def __call__(self, tokens: Tokens):
        return NLL()(tokens)
