"""UFT, unified fine-tuning by a generalised implicit reward: demonstrations and scored answers in
one regression. (UFT with hints is another method: `uft`.)

    L      = mean over answers of (s(beta (S - S^ref)) - r)^2,    S the sum of log p_t of a response
    r      = 1 for a demonstration and a chosen answer, 0 for a rejected one, or what a column says,
             from 0 to 1

An answer's probability grows where s(...) is below r, and falls where it is above. With `column`
set, every answer needs it, and it says r. If it is not set, the role says r; an answer without a
role has the number of its column `score`, and 1 where there is none: it is a demonstration.

Source: arXiv 2410.21438, row 65 of the catalogue, read through notes; beta 0.01 from there. Not
built: its form on differences of pairs. UNVERIFIED: which of its losses made the tables. Answers
are those of data.experts: pairs, or rows with the column. No `demos`: demonstrations are answers
with r = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.columns import column_number
from tandem.algorithms.parts.objectives.preference import ImplicitReward
from tandem.algorithms.parts.pairs import CHOSEN, ROLES, answer_row, check_role
from tandem.algorithms.preference_method import check_positive
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Trajectory

SCORE = "score"


@dataclass
class ImplicitRewardRegression(Method):
    title: ClassVar[str] = "demonstrations and scored answers: regression of the implicit reward"
    paper: ClassVar[str] = "2410.21438"
    uses_experts: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    beta: float = 0.01
    column: str | None = None  # None: roles, then the column `score`

    def __post_init__(self):
        check_positive(beta=self.beta)

    def rows(self, batch: Batch):
        rows = []
        for answer in batch.experts:
            row = answer_row(answer, "regression", answer.role)
            rows.append(row.with_streams(target_reward=self.target(answer)))
        return rows

    def target(self, answer: Trajectory) -> float:
        """r. Raises ConfigError for an answer that does not say it."""
        if self.column is not None:
            if answer.group >= 0:
                raise MethodError(
                    f"method.column is {self.column!r}, but the answer to prompt "
                    f"{answer.prompt_id!r} is half of a pair, whose two answers share one row; "
                    "leave method.column out: the chosen one counts as 1, the rejected one as 0"
                )
            return column_number(answer.columns, self.column, answer.prompt_id, 0.0, 1.0)
        if answer.role in ROLES:
            return float(answer.role == CHOSEN)
        if SCORE in answer.columns:
            return column_number(answer.columns, SCORE, answer.prompt_id, 0.0, 1.0)
        if answer.role:
            check_role(answer)
        return 1.0

    def terms(self, batch: Batch):
        objective = ImplicitReward(self.beta)
        return [Term("regression", objective, unit="row", needs=objective.needs)]
