"""Q-Tuning: of the demonstrations of a step only those are trained that the present model is
surprised or unsure about, and of the surprising ones not the tokens that are likely noise.

    PPL_i = exp(mean_t nll_t),  H_i = mean_t entropy_t       over row i, before the update
    u_i, v_i    the place of PPL_i and of H_i among the rows, from 0 (lowest) to 1
    Q2          high PPL, low entropy: confident errors. Kept, its tokens pruned
    Q4          low PPL, high entropy: calibration. Kept whole
    (Q1, both high: noise; Q3, both low: known. Dropped)
    Q2 tokens   s_t = (1 - lam) PPL_t + lam (PPL_{t-1} + PPL_{t+1})/2; the `keep_tokens` share with
                the lowest s is trained
    L           = TOK_kept{ -log p_t }

Source: row 18 of the catalogue, from the paper's text; its token rule agrees with another port.
Budgets there: rows 12.5, 25 or 50 %, tokens 50 to 70 %, lam 0.5. The paper searches one level alpha
of both quantiles by bisection until Q2 and Q4 hold the budget. A row is in Q2 from alpha = max(1 -
u, v) on, in Q4 from max(u, 1 - v) on: here the rows with the lowest such alpha are kept, which is
where the bisection ends, and meets the budget exactly (of equals by the prompt's id). The paper
prints the neighbours' term without the 1/2, and says their average.

Reading: "keep the top share by s" alone could mean the highest; figure and text say the lowest:
`keep_low: false` is the other reading. A token at an end has one neighbour. No `demos`: the choice
is made for -log p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.rows import expert_row
from tandem.engine.core.types import Row
from tandem.engine.model.quantities import Entropy

TERM = "sft"


@dataclass
class QTuning(Method):
    title: ClassVar[str] = "SFT on what surprises the model, less the tokens that are likely noise"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    keep_rows: float = 0.25
    keep_tokens: float = 0.5  # of the rows in Q2
    lam: float = 0.5
    keep_low: bool = True

    def __post_init__(self):
        for name in ("keep_rows", "keep_tokens"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be in (0, 1]")
        if not 0.0 <= self.lam <= 1.0:
            raise ValueError(f"lam is {self.lam}, must be in [0, 1]")

    def probes(self, batch: Batch):
        return {"old_entropy": Entropy()}

    def rows(self, batch: Batch):
        return [expert_row(t, TERM) for t in batch.experts]

    def terms(self, batch: Batch):
        return [Term(TERM, NLL(), needs=frozenset({"old_logp"}))]

    def credit(self, rows: Sequence[Row], batch: Batch):
        if not rows:
            return rows
        trained = [np.flatnonzero(row.weights[TERM]) for row in rows]
        nll = [-row.streams["old_logp"][at] for row, at in zip(rows, trained, strict=True)]
        entropy = [row.streams["old_entropy"][at] for row, at in zip(rows, trained, strict=True)]
        kept, surprising = self.choose(
            np.array([np.exp(values.mean()) for values in nll]),
            np.array([values.mean() for values in entropy]),
            [row.prompt_id for row in rows],
        )
        found = []
        for i, row in enumerate(rows):
            weight = np.zeros(len(row.tokens), np.float32)
            if kept[i] and surprising[i]:
                weight[trained[i][self.clean(np.exp(nll[i]))]] = 1.0
            elif kept[i]:
                weight[trained[i]] = 1.0
            found.append(row.with_term(TERM, weight))
        return found

    def choose(
        self, perplexity: np.ndarray, entropy: np.ndarray, prompt_ids: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(kept, in Q2 rather than Q4), bool [rows] each."""
        u, v = places(perplexity), places(entropy)
        level_q2 = np.maximum(1 - u, v)
        level_q4 = np.maximum(u, 1 - v)
        level = np.minimum(level_q2, level_q4)
        count = max(1, round(self.keep_rows * len(level)))
        kept = np.zeros(len(level), bool)
        order = np.lexsort((np.array(prompt_ids), level))
        kept[order[:count]] = True
        return kept, level_q2 <= level_q4

    def clean(self, perplexity: np.ndarray) -> np.ndarray:
        """Numbers of a row's tokens that are trained."""
        padded = np.pad(perplexity, 1, mode="reflect" if len(perplexity) > 1 else "edge")
        neighbours = (padded[:-2] + padded[2:]) / 2
        score = (1 - self.lam) * perplexity + self.lam * neighbours
        if not self.keep_low:
            score = -score
        # 1e-6: 0.6 * 5 is a little more than 3 in binary
        count = math.ceil(self.keep_tokens * len(score) - 1e-6)
        return np.sort(np.argsort(score, kind="stable")[:count])


def places(values: np.ndarray) -> np.ndarray:
    """[n]: the place of each among all, from 0 for the lowest to 1; equals share the lower one."""
    below = np.searchsorted(np.sort(values), values)
    return below / max(1, len(values) - 1)
