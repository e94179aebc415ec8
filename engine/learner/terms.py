"""Terms: from per-token losses to the loss of a step, with denominators counted over the whole
global batch.

    L = sum_term coefficient * ( sum_rows sum_t weight * scale * correction * objective ) / Z_term

Weights are the rows', scale and Z the reduction's (algorithms/parts/reductions.py), correction is 1
for a term without one.

The same `micro_batch_loss` serves the learner on a GPU and anyone who wants a method's loss on
hand-made numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tandem.algorithms.base import Term
from tandem.algorithms.checks.losses import (
    Seen,
    check_missing_streams,
    check_tensor,
    objective_losses,
    visible_streams,
)
from tandem.algorithms.checks.method import real
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.objectives.units import Groups, Units, units_of
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import MicroBatch, Row
from tandem.engine.learner.metrics import StepMetrics


def row_counts(rows: Sequence[Row], term: str) -> np.ndarray:
    """int [rows]: how many tokens each row has in `term`."""
    counts = np.zeros(len(rows), np.int64)
    for i, row in enumerate(rows):
        if term in row.weights:
            counts[i] = np.count_nonzero(row.weights[term])
    return counts


def unit_counts(rows: Sequence[Row], term: Term) -> np.ndarray:
    """What Z is counted from: the tokens of each row, or a 1 for each row or group in the term."""
    counts = row_counts(rows, term.name)
    if term.unit == "token":
        return counts
    in_term = np.minimum(counts, 1)
    if term.unit == "row":
        return in_term
    groups = {row.group for row, count in zip(rows, counts, strict=True) if count}
    return np.ones(len(groups), np.int64)


def denominators(terms: Sequence[Term], rows: Sequence[Row]) -> dict[str, float]:
    """Z of every term over `rows`: all those of one optimizer update.

    Raises ValueError if a row uses a term that the method did not declare.
    """
    known = {term.name for term in terms}
    for row in rows:
        if stray := set(row.weights) - known:
            raise ValueError(
                f"rows of prompt {row.prompt_id!r} carry weights for {sorted(stray)}, but "
                f"the method's terms are {sorted(known)}"
            )
    return {term.name: denominator(term, unit_counts(rows, term)) for term in terms}


def denominator(term: Term, counts: np.ndarray) -> float:
    """Z of a term.

    A custom reduction is not checked for a term without tokens.
    """
    z = term.reduction.denominator(counts)
    if not counts.any():
        return z
    found = real(z)
    if not found or not np.isfinite(found):
        raise MethodError(
            f"term {term.name!r}: its reduction's denominator is {z!r}, expected a finite "
            "number other than 0"
        )
    return found


def make_tokens(micro: MicroBatch, outputs: Mapping[str, Tensor]) -> Tokens:
    """The objective's view of a micro-batch: its own streams, and what the model says of it, as
    Policy.forward returns it.
    """
    logp = outputs["logp"]
    streams = {}
    for name, stream in micro.streams.items():
        streams[name] = torch.as_tensor(stream, device=logp.device)
    for name, output in outputs.items():
        if name != "logp":
            streams[name] = output
    return Tokens(
        logp=logp,
        segment=torch.as_tensor(micro.segment, device=logp.device),
        group=torch.as_tensor(micro.group, device=logp.device),
        source=torch.as_tensor(micro.source, device=logp.device),
        streams=streams,
    )


def micro_batch_loss(
    terms: Sequence[Term], z: Mapping[str, float], micro: MicroBatch, tokens: Tokens
) -> tuple[Tensor, StepMetrics]:
    """This micro-batch's part of the step's loss, and its metrics.

    The loss is a scalar attached to everything that any rank may differentiate even when no token
    here belongs to any term (a rank without rows still has to run its whole backward pass, or
    collectives of the other ranks would wait forever). The metrics are detached: the sum
    `loss/TERM` (already divided by Z), and the means `TERM/METRIC` over the term's tokens (its
    rows or groups, where these are its unit) and `TERM/PART/METRIC` over those that an objective
    reports on as a part.
    """
    loss = attached_zero(terms, tokens)
    found = StepMetrics()
    for term in terms:
        if term.name not in micro.weights:
            continue
        # computed on the host to avoid a device sync
        in_term = np.flatnonzero(micro.weights[term.name])
        if len(in_term) == 0:
            continue
        index = torch.as_tensor(in_term, device=tokens.logp.device)
        chosen = visible_streams(term, terms, tokens.take(index))
        seen: Seen = chosen
        if term.unit != "token":
            seen = units_seen(term, micro, in_term, chosen)
            # a unit weighs as its first token does
            index = torch.as_tensor(in_term[seen.starts], device=index.device)
        losses, metrics = objective_losses(term, seen, chosen.logp)
        check_missing_streams(term, micro, seen, losses)
        weight = torch.as_tensor(micro.weights[term.name], device=index.device)[index]
        scale = torch.as_tensor(micro.scale[term.name], device=index.device)[index]
        factor = weight * scale
        if term.correction is not None and "behaviour_logp" in chosen:
            correction = term.correction(chosen)
            check_tensor(f"term {term.name!r}: its correction", correction, len(index))
            factor = factor * correction
            metrics = {**metrics, "correction": correction}
        value = (factor * losses).sum() / z[term.name]
        loss = loss + term.coefficient * value
        found.add_sum(f"loss/{term.name}", value.detach())
        add_metrics(found, term.name, metrics, len(index))
    return loss, found


def units_seen(
    term: Term, micro: MicroBatch, in_term: np.ndarray, tokens: Tokens
) -> Units | Groups:
    """What the objective of a term with that unit is called with."""
    units = units_of(micro, in_term, tokens)
    return units if term.unit == "row" else Groups(units, term.name)


def attached_zero(terms: Sequence[Term], tokens: Tokens) -> Tensor:
    """0, as a function of every number that has a gradient."""
    entropy_is_trained = any("entropy" in term.needs for term in terms)
    zero = tokens.logp.sum() * 0.0
    for name, stream in tokens.streams.items():
        if not stream.requires_grad or (name == "entropy" and not entropy_is_trained):
            continue
        zero = zero + stream.sum() * 0.0
    return zero


def add_metrics(found: StepMetrics, term: str, metrics: Mapping, count: int) -> None:
    """Add a term's metrics over its `count` tokens, rows or groups: {METRIC: [n], or PART: {METRIC:
    [m]}}."""
    whole = f"loss/{term}"  # prefixed, so it cannot collide with the counts of `observe`
    found.add_count(whole, count)
    for key, metric in metrics.items():
        if not isinstance(metric, Mapping):
            found.add_mean(f"{term}/{key}", metric.detach().sum(), count_of=whole)
            continue
        part = f"{whole}/{key}"
        size = 0
        for name, values in metric.items():
            found.add_mean(f"{term}/{key}/{name}", values.detach().sum(), count_of=part)
            size = len(values)
        found.add_count(part, size)
