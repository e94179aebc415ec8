"""What terms need of a step's rows from before the update: log-probs and values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tandem.algorithms.base import Term
from tandem.algorithms.checks.rows import has_tokens
from tandem.engine.core.types import Row
from tandem.engine.learner.protocol import Learner

# {stream of a Row: its name in Learner.compute_streams}
LEARNER_STREAMS = {"old_logp": "logp", "old_value": "value"}


def with_streams(
    learner: Learner, rows: Sequence[Row], terms: Sequence[Term], temperature: float
) -> list[Row]:
    """Add the learner's own log-probs and values, and the reference's log-probs, where terms need
    them.

    Only rows with a token of a term that needs a stream are scored; the stream stays absent (None)
    in all others.
    """
    rows = list(rows)
    wanted = [name for name in LEARNER_STREAMS if any(name in term.needs for term in terms)]
    chosen = needing(rows, terms, wanted)
    if chosen:
        found = learner.compute_streams([rows[i] for i in chosen], temperature)
        rows = filled(rows, chosen, {name: found[LEARNER_STREAMS[name]] for name in wanted})
    chosen = needing(rows, terms, ["ref_logp"])
    if chosen:
        logps = learner.logprobs([rows[i] for i in chosen], temperature, reference=True)
        rows = filled(rows, chosen, {"ref_logp": logps})
    return rows


def with_old_logp(learner: Learner, rows: Sequence[Row], temperature: float) -> list[Row]:
    """Add the learner's own log-probs to the trained rows that have none: with several updates the
    clip needs those from before the first.
    """
    chosen = [i for i, row in enumerate(rows) if row.old_logp is None and row.trained.any()]
    if not chosen:
        return list(rows)
    logps = learner.logprobs([rows[i] for i in chosen], temperature)
    return filled(rows, chosen, {"old_logp": logps})


def needing(rows: Sequence[Row], terms: Sequence[Term], streams: Sequence[str]) -> list[int]:
    """Numbers of the rows that have a token of a term that needs one of `streams`."""
    names = [term.name for term in terms if any(stream in term.needs for stream in streams)]
    return [i for i, row in enumerate(rows) if any(has_tokens(row, name) for name in names)]


def filled(
    rows: Sequence[Row], chosen: Sequence[int], streams: Mapping[str, Sequence[np.ndarray]]
) -> list[Row]:
    """All rows; those numbered in `chosen` with `streams`, {name: one float32 [T] for each}."""
    rows = list(rows)
    for place, i in enumerate(chosen):
        rows[i] = replace(rows[i], **{name: found[place] for name, found in streams.items()})
    return rows
