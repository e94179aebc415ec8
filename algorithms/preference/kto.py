"""KTO: single answers that are good or bad, each judged by its gain on the reference against the
gain that answers have on average.

    r  = S - S^ref,    S the sum of log p_t over a response
    L  = mean over answers of  desirable   (1 - s(beta (r - z0)))    of a good one
                               undesirable (1 - s(beta (z0 - r)))    of a bad one
    z0 = max(0, mean of r over mismatched answers), an estimate of KL(pi || pi_ref)

Source: arXiv 2402.01306 and the authors' code, from memory; beta 0.1, both weights 1. The paper
wants desirable * n_good : undesirable * n_bad within 1 : 1 and 4 : 3.

z0 carries no gradient. Paper and code: the code estimates it per micro-batch with the weights of
each, shifting the answers by one; here it is one number of the step, from before its update, each
prompt with an answer to the next one, so that no packing changes it. With one prompt it is 0. Its
forwards are those of the present policy and the reference over as many rows as there are prompts.

`pairs: data`: answers of a source of pairs, or of one whose `role` column says chosen or rejected.
`pairs: rollouts`: every rollout, good from reward `good` on. No `demos`: a good answer's formula is
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.checks.rows import has_tokens
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.preference import ProspectValue
from tandem.algorithms.parts.pairs import (
    answer_row,
    judged_demonstrations,
    judged_rollouts,
    mismatched,
)
from tandem.algorithms.preference_method import PreferenceMethod, check_positive
from tandem.engine.core.types import Row


@dataclass
class KTO(PreferenceMethod):
    title: ClassVar[str] = "good and bad answers, each against the average gain on the reference"
    paper: ClassVar[str] = "2402.01306"

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    takes_pairs: ClassVar[bool] = True
    uses_pairs: ClassVar[bool] = False
    good: float = 1.0  # a rollout with at least this reward is good

    def __post_init__(self):
        check_positive(beta=self.beta)

    def objective(self):
        return ProspectValue(self.beta, self.desirable, self.undesirable)

    def rows(self, batch: Batch):
        answers = judged_rollouts(batch.groups, self.good)
        if self.uses_experts:
            answers = judged_demonstrations(batch.experts)
        rows = [answer_row(answer, "kto", answer.role, answer.group) for answer in answers]
        return rows + mismatched(rows, "kto", "kl")

    def terms(self, batch: Batch):
        objective = self.objective()
        # only so that its rows are scored before the update; `credit` then drops them
        before = Term("kl", NLL(), coefficient=0.0, needs=frozenset({"old_logp", "ref_logp"}))
        return [Term("kto", objective, unit="row", needs=objective.needs), before]

    def credit(self, rows: Sequence[Row], batch: Batch):
        found = []
        z0 = divergence([row for row in rows if has_tokens(row, "kl")])
        for row in rows:
            if "kl" in row.weights:
                found.append(row.with_term("kl", 0 * row.weights["kl"]))
            else:
                found.append(row.with_streams(z0=z0))
        return found


def divergence(rows: Sequence[Row]) -> float:
    """The mean gain of rows on the reference, before the update; at least 0."""
    gains = [0.0]
    for row in rows:
        ratio = row.streams["old_logp"] - row.streams["ref_logp"]
        gains.append(float(ratio[row.weights["kl"] != 0].sum()))
    return max(0.0, sum(gains) / max(1, len(rows)))
