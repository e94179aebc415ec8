"""The base of methods that learn from pairs of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tandem.algorithms.base import Batch, Budget, Demand, Method, Term
from tandem.algorithms.parts.pairs import Pair, pairs_of_data, pairs_of_rollouts
from tandem.engine.core.errors import ConfigError

TERM = "preference"


@dataclass
class PreferenceMethod(Method):
    """A method with one objective on pairs, which `objective` gives.

    `pairs` is where they are from: a source with `chosen` and `rejected`, or the best and the worst
    of each group of rollouts.
    """

    pairs: Literal["data", "rollouts"] = "data"

    @property
    def uses_experts(self) -> bool:
        return self.pairs == "data"

    @property
    def uses_pairs(self) -> bool:
        return self.pairs == "data"

    @property
    def uses_rollouts(self) -> bool:
        return self.pairs == "rollouts"

    def demand(self, step: int, budget: Budget, signals: Mapping[str, float]) -> Demand:
        if self.uses_rollouts and budget.samples < 2:
            raise ConfigError(
                "method.pairs is 'rollouts', but rollout.samples_per_prompt is 1, and no answer is "
                "better than another one then; set it to at least 2"
            )
        return super().demand(step, budget, signals)

    def found_pairs(self, batch: Batch) -> list[Pair]:
        if self.uses_rollouts:
            return pairs_of_rollouts(batch.groups)
        return pairs_of_data(batch.experts)

    def rows(self, batch: Batch):
        rows = []
        for pair in self.found_pairs(batch):
            rows += pair.rows(TERM)
        return rows

    def terms(self, batch: Batch):
        objective = self.objective()
        return [Term(TERM, objective, unit="group", needs=objective.needs)]

    def objective(self) -> Any:
        """Of the pairs: one of algorithms/parts/objectives/preference.py, with its `needs`."""
        raise NotImplementedError


def check_positive(**options: float) -> None:
    """Raise ValueError for an option that is not above 0."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, must be above 0")
