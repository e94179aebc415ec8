"""PoFT: SFT that prefers the model to aligned ones: a demonstration that these find unlikely is
learnt less.

    L = mean over demonstrations of -log s(M - mean_j r_j)
    M the mean of log p_t over the response,    r_j the same by an aligned model j

Its gradient is that of -M times g/(g + exp(M)), g the geometric mean of exp(r_j): 1/2 where the
model is level with them, near 0 for a demonstration with low g.

Source: arXiv 2412.12865, row 20 of the catalogue, read through notes; there are three such models
(zephyr-7b-sft-full, Llama-3-8B-Instruct, Yi-6B-Chat) and the settings of SFT. r_j are numbers of
the data, per token of model j's own: `models` are the columns that hold them, e.g. joined by the
`scores` of a dataset. No `demos`: the likelihood stands within the logistic function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.columns import column_number
from tandem.algorithms.parts.objectives.preference import AboveOthers
from tandem.algorithms.parts.pairs import answer_row


@dataclass
class PoFT(Method):
    title: ClassVar[str] = "SFT weighted by how likely aligned models find the demonstration"
    paper: ClassVar[str] = "2412.12865"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    models: list = field(default_factory=lambda: ["mean_logp"])

    def __post_init__(self):
        if not self.models:
            raise ValueError("models is empty, expected the columns of at least one aligned model")

    def rows(self, batch: Batch):
        rows = []
        for expert in batch.experts:
            columns, prompt_id = expert.columns, expert.prompt_id
            known = []
            for name in self.models:
                known.append(column_number(columns, name, prompt_id, -math.inf, 0.0))
            row = answer_row(expert, "sft", expert.role)
            rows.append(row.with_streams(aligned=sum(known) / len(known)))
        return rows

    def terms(self, batch: Batch):
        objective = AboveOthers()
        return [Term("sft", objective, unit="row", needs=objective.needs)]
