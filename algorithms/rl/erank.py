"""ERank: a reranker that thinks, then writes a score; its reward is what that score does to the
ranking of all documents of the query.

    s     the last whole number of a response, 0 .. 10 (8.5 is none)
    phi   1 + samples of the query that score more (of the N documents times G samples that are in
          the step)
    R     a positive document    1 / phi
          a negative one         -1 if s is above the score of any sample of a positive, else
                                 1 - ((s - t) / 10)^2,  t the score of the SFT model
          no score               -1
    L     = L_GRPO, compared among the G samples of one document

Source: row 32 of the catalogue. UNVERIFIED: the numbers -1 and 10, and what a tie with a positive
counts as (here: not above it). Columns of the rows: `query` (any name of it), `positive` (true or
false), `score` of the SFT model for negatives. A step should hold whole queries: unshuffled data,
and rollout.prompts_per_step a multiple of N. It needs no reward functions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.columns import column, column_number
from tandem.algorithms.rl_method import RLMethod
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.core.types import ScoredGroup

HIGHEST = 10


@dataclass
class ERank(RLMethod):
    title: ClassVar[str] = "GRPO for rerankers: the reward is a score's place among the query's"
    uses_rewards: ClassVar[bool] = False

    penalty: float = -1.0

    def score(self, batch: Batch):
        queries: dict[str, list[ScoredGroup]] = {}
        for group in batch.groups:
            query = column(group.prompt.columns, "query", group.prompt.id)
            queries.setdefault(str(query), []).append(group)
        rewards = {}
        for groups in queries.values():
            rewards.update(self.rewards(groups))
        groups = [replace(group, rewards=rewards[group.group]) for group in batch.groups]
        return replace(batch, groups=tuple(groups))

    def rewards(self, groups: list[ScoredGroup]) -> dict[int, np.ndarray]:
        """{group: float32 [samples]} of the documents of one query."""
        scores = {
            group.group: np.array([written(text) for text in group.texts]) for group in groups
        }
        of_all = np.concatenate(list(scores.values()))
        positives = [scores[group.group] for group in groups if positive(group)]
        of_positives = np.concatenate([np.array([np.nan]), *positives])
        found = {}
        for group in groups:
            values = []
            for score in scores[group.group]:
                values.append(self.reward(score, group, of_all, of_positives))
            found[group.group] = np.array(values, np.float32)
        return found

    def reward(self, score, group: ScoredGroup, of_all: np.ndarray, of_positives: np.ndarray):
        if np.isnan(score):
            return self.penalty
        if positive(group):
            return 1.0 / (1 + np.count_nonzero(of_all > score))
        if (of_positives < score).any():
            return self.penalty
        prompt = group.prompt
        expected = column_number(prompt.columns, "score", prompt.id, 0, HIGHEST)
        return 1.0 - ((score - expected) / HIGHEST) ** 2

    def rows(self, batch: Batch):
        return self.policy.rows(batch.groups)

    def terms(self, batch: Batch):
        return self.policy.terms(batch)


def written(text: str) -> float:
    """The last whole number of a response, decimals left out; NaN where it is none from 0 to 10."""
    numbers = re.findall(r"\d+(?:\.\d+)*", text)
    whole = [float(number) for number in numbers if "." not in number]
    if not whole or whole[-1] > HIGHEST:
        return float("nan")
    return whole[-1]


def positive(group: ScoredGroup) -> bool:
    prompt = group.prompt
    found = column(prompt.columns, "positive", prompt.id)
    if found not in (True, False):
        raise ConfigError(
            f"{prompt.id}: column 'positive' is {brief(found)}, expected true or false"
        )
    return bool(found)
