"""What terms need of a step's rows from before the update: log-probs and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tandem.algorithms.base import Term
from tandem.algorithms.checks.rows import has_tokens
from tandem.engine.config.names import model_of, split_view
from tandem.engine.core.types import Row
from tandem.engine.learner.protocol import Learner
from tandem.engine.model.quantities import Quantity

# {stream of a Row: its name in Learner.compute_streams}
LEARNER_STREAMS = {"old_logp": "logp", "old_value": "value"}


def with_streams(
    learner: Learner,
    rows: Sequence[Row],
    terms: Sequence[Term],
    temperature: float,
    probes: Mapping[str, Quantity] | None = None,
) -> list[Row]:
    """Add the learner's own log-probs and values, and the log-probs of other models, where terms
    need them, and the method's `probes` to all rows that are trained.

    Only rows with a token of a term that needs a stream are scored; it stays absent in all
    others. A row that brings the stream keeps its own, and is not scored for it.
    """
    rows = list(rows)
    needed: set[str] = set()
    for term in terms:
        needed.update(term.needs)
    wanted = [name for name in LEARNER_STREAMS if name in needed]
    chosen = needing(rows, terms, wanted)
    if probes:
        chosen = [i for i, row in enumerate(rows) if row.trained.any()]
    if chosen:
        scored = [rows[i] for i in chosen]
        found = learner.compute_streams(scored, temperature, quantities=probes)
        for name in wanted:
            values = found[LEARNER_STREAMS[name]]
            fill_in(rows, chosen, name, values)
        for name in probes or ():
            fill_in(rows, chosen, name, found[name])
    for name in sorted(needed):
        model = model_of(name)
        if model is not None:
            chosen = needing(rows, terms, [name])
            score_by(learner, rows, chosen, name, model, temperature)
    return rows


def score_by(
    learner: Learner,
    rows: list[Row],
    chosen: Sequence[int],
    stream: str,
    model: str,
    temperature: float,
) -> None:
    """Give the rows numbered in `chosen` the log-probs of a model, `NAME` or `NAME@VIEW`."""
    if not chosen:
        return
    name, view = split_view(model)
    scored = [rows[i] for i in chosen]
    if not view:
        fill_in(rows, chosen, stream, learner.logprobs(scored, temperature, name))
        return
    seen = [row.at_view(view) for row in scored]
    values = []
    for row, other, logp in zip(
        scored, seen, learner.logprobs(seen, temperature, name), strict=True
    ):
        values.append(moved_back(row, other, logp))
    fill_in(rows, chosen, stream, values)


def moved_back(row: Row, seen: Row, logp: np.ndarray) -> np.ndarray:
    """Numbers [T] of a row at a view -> of the row itself: NaN on its prompt."""
    found = np.full(len(row.tokens), np.nan, np.float32)
    found[row.response_start :] = logp[seen.response_start :]
    return found


def with_old_logp(learner: Learner, rows: Sequence[Row], temperature: float) -> list[Row]:
    """Add the learner's own log-probs to the trained rows that have none: with several updates the
    clip needs those from before the first.
    """
    rows = list(rows)
    chosen = []
    for i, row in enumerate(rows):
        if "old_logp" not in row.streams and row.trained.any():
            chosen.append(i)
    if chosen:
        scored = [rows[i] for i in chosen]
        logps = learner.logprobs(scored, temperature)
        fill_in(rows, chosen, "old_logp", logps)
    return rows


def needing(rows: Sequence[Row], terms: Sequence[Term], streams: Sequence[str]) -> list[int]:
    """Numbers of the rows that lack one of `streams` and have a token of a term that needs it."""
    found = []
    for i, row in enumerate(rows):
        lacking = set(streams) - row.streams.keys()
        asking = [term.name for term in terms if not term.needs.isdisjoint(lacking)]
        if any(has_tokens(row, name) for name in asking):
            found.append(i)
    return found


def fill_in(
    rows: list[Row], chosen: Sequence[int], name: str, values: Sequence[np.ndarray]
) -> None:
    """Give the rows numbered in `chosen` the stream `name`, one float32 [T] for each, unless they
    bring it themselves.
    """
    for i, value in zip(chosen, values, strict=True):
        if name not in rows[i].streams:
            rows[i] = rows[i].with_streams(**{name: value})
