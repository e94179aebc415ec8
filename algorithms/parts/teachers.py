"""A teacher's signal in the place of rewards: how much likelier the policy finds its own tokens
than a teacher does, d = log pi - log pi_teacher, from before the update and without gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.algorithms.checks.rows import has_tokens
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.config.names import logp_of
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Row, Source

DIVERGENCE = "divergence"


class Measured:
    """The quantity DIVERGENCE of the term, as its loss."""

    def __call__(self, tokens: Tokens):
        found = tokens[DIVERGENCE]
        return found, {DIVERGENCE: found.detach()}


def sampled(row: Row, term: str) -> np.ndarray:
    """bool [T]: tokens of the term that the policy sampled. Of others d is no sample."""
    return (row.weights[term] != 0) & (row.source == Source.POLICY)


def distance(row: Row, term: str, model: str) -> np.ndarray:
    """float32 [n]: d of the row's sampled tokens. `model` is NAME or NAME@VIEW.

    Raises MethodError if a token has no score: as a 0 it would say that the teacher is certain.
    """
    found = np.full(len(row.tokens), np.nan, np.float32)
    theirs = row.streams.get(logp_of(model))
    if theirs is not None:
        found = row.streams["old_logp"] - theirs
    mask = sampled(row, term)
    missing = np.flatnonzero(mask & ~np.isfinite(found))
    if len(missing):
        raise MethodError(
            f"term {term!r}: token {missing[0]} of a row of prompt {row.prompt_id!r} has no finite "
            f"score of the model {model!r}, expected one for each token that was sampled"
        )
    return found[mask]


def less_distance(
    rows: Sequence[Row], term: str, model: str, coefficient: float, clip: float | None
) -> list[Row]:
    """The rows with A - coefficient * d as the advantages of sampled tokens, d kept within
    [-clip, clip] if that is given.
    """
    found = []
    for row in rows:
        if has_tokens(row, term):
            d = distance(row, term, model)
            if clip is not None:
                d = d.clip(-clip, clip)
            advantage = row.streams["advantage"].astype(np.float32)
            advantage[sampled(row, term)] -= np.float32(coefficient) * d
            row = row.with_streams(advantage=advantage)
        found.append(row)
    return found


def teacher_diagnostics(
    rows: Sequence[Row], term: str, model: str, clip: float | None
) -> dict[str, float]:
    """Share of rows that are trained; and where d is known its mean, the mean of e^-d - 1 + d,
    which is a distance too and never negative, and the share of clipped tokens.
    """
    mine = [row for row in rows if term in row.weights]
    if not mine:
        return {}
    trained = [row for row in mine if has_tokens(row, term)]
    found = {"teacher/rows": len(trained) / len(mine)}
    scored = [row for row in trained if {"old_logp", logp_of(model)} <= row.streams.keys()]
    if not scored:
        return found
    d = np.concatenate([distance(row, term, model) for row in scored]).astype(np.float64)
    found["teacher/distance"] = float(d.mean())
    found["teacher/k3"] = float((np.expm1(-d) + d).mean())
    if clip is not None:
        found["teacher/clipped"] = float((np.abs(d) > clip).mean())
    return found
