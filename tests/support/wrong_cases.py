"""A method that is right, and ways to make one that is not: each changes one thing of it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from method_cases import batch, half

from tandem.algorithms.base import Method, Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.rows import expert_row
from tandem.engine.learner.inspect import inspect


@dataclass
class Right(Method):
    """SFT in two terms. The cases below replace one part of it."""

    uses_experts: ClassVar[bool] = True

    def rows(self, batch):
        rows = [expert_row(t, "sft") for t in batch.experts]
        for row in rows:
            row.weights["again"] = row.weights["sft"].copy()
        return rows

    def terms(self, batch):
        return [Term("sft", NLL()), Term("again", NLL(), coefficient=0.5)]


def wrong(**parts):
    """A method like Right with some of its functions replaced."""
    return type("Wrong", (Right,), parts)()


def look(method, logp=half, **more):
    return inspect(method, batch(groups=()), logp, **more)


def loss(function):
    """An objective that is only a loss."""
    return lambda tokens: (function(tokens), {})


def with_terms(*terms):
    return wrong(terms=lambda self, batch: list(terms))


def with_objective(objective):
    return with_terms(Term("sft", objective), Term("again", NLL()))


def with_row(change):
    """Right, with the first row changed."""

    def rows(self, batch):
        first, *others = Right.rows(self, batch)
        return [change(first), *others]

    return wrong(rows=rows)


def with_weights(row, **weights):
    return replace(row, weights={**row.weights, **weights})
