"""Terms: from per-token losses to the loss of a step, with denominators counted over the whole
global batch.

    L = sum_term coefficient * ( sum_rows sum_t weight * scale * correction * objective ) / Z_term

The same `evaluate` serves the learner on a GPU and anyone who wants a method's loss on hand-made
numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from tandem.algorithms.base import Term
from tandem.algorithms.checks.losses import asked_for, check_given, check_tensor, checked_losses
from tandem.algorithms.checks.method import real
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import MicroBatch, Row


def row_counts(rows: Sequence[Row], term: str) -> np.ndarray:
    """int [rows]: how many tokens each row has in `term`."""
    return np.array(
        [int((row.weights[term] != 0).sum()) if term in row.weights else 0 for row in rows],
        np.int64,
    )


def denominators(terms: Sequence[Term], rows: Sequence[Row]) -> dict[str, float]:
    """Z of every term over all rows of the step.

    Raises ValueError if a row uses a term that the method did not declare.
    """
    known = {term.name for term in terms}
    for row in rows:
        if stray := set(row.weights) - known:
            raise ValueError(
                f"rows of prompt {row.prompt_id!r} carry weights for {sorted(stray)}, but "
                f"the method's terms are {sorted(known)}"
            )
    return {term.name: denominator(term, row_counts(rows, term.name)) for term in terms}


def denominator(term: Term, counts: np.ndarray) -> float:
    """Z of a term.

    A reduction of the user's own may give none where the term has no token, since it is not asked
    for there.
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


def streams(
    micro: MicroBatch,
    logp: torch.Tensor,
    entropy: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    extra: Mapping[str, torch.Tensor] = {},
) -> Tokens:
    """The objective's view of a micro-batch. logp, entropy, the critic's value and a custom
    forward's extra streams: float32 [n] on the compute device.
    """

    def tensor(name):
        return (
            torch.as_tensor(micro.streams[name], device=logp.device)
            if name in micro.streams
            else None
        )

    return Tokens(
        logp=logp,
        segment=torch.as_tensor(micro.segment, device=logp.device),
        group=torch.as_tensor(micro.group, device=logp.device),
        source=torch.as_tensor(micro.source, device=logp.device),
        advantage=tensor("advantage"),
        old_logp=tensor("old_logp"),
        behaviour_logp=tensor("behaviour_logp"),
        ref_logp=tensor("ref_logp"),
        entropy=entropy,
        value=value,
        old_value=tensor("old_value"),
        returns=tensor("returns"),
        extra=extra,
    )


def evaluate(
    terms: Sequence[Term], z: Mapping[str, float], micro: MicroBatch, tokens: Tokens
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the step's loss, and sums for the report.

    Returns (loss, sums): `loss` is a scalar attached to everything that any rank may differentiate
    even when no token here belongs to any term (a rank without rows still has to run its whole
    backward pass, or collectives of the other ranks would wait for ever). `sums` are detached
    scalars to be added up over micro-batches and ranks: `loss/TERM` (already divided by Z),
    `count/TERM` (tokens), `sum/TERM/METRIC` (token sums, divided by the count at the end, see
    `means`), and the same of `TERM/PART` where an objective reports on some of its tokens.
    """
    attached = [
        tokens.logp,
        tokens.value,
        *tokens.extra.values(),
        tokens.entropy if any("entropy" in term.needs for term in terms) else None,
    ]
    loss = sum(stream.sum() * 0.0 for stream in attached if stream is not None)
    sums: dict[str, torch.Tensor] = {}
    for term in terms:
        if term.name not in micro.weights:
            continue
        weight = torch.as_tensor(micro.weights[term.name], device=tokens.logp.device)
        # found on the host: nobody waits for a GPU
        index = torch.as_tensor(np.flatnonzero(micro.weights[term.name]), device=weight.device)
        if len(index) == 0:
            continue
        chosen = asked_for(term, terms, tokens.take(index))
        per_token, metrics = checked_losses(term, chosen)
        check_given(term, micro, chosen, per_token)
        factor = (
            weight[index] * torch.as_tensor(micro.scale[term.name], device=weight.device)[index]
        )
        if term.correction is not None and chosen.behaviour_logp is not None:
            correction = term.correction(chosen)
            check_tensor(f"term {term.name!r}: its correction", correction, len(index))
            factor = factor * correction
            metrics = {**metrics, "correction": correction}
        value = (factor * per_token).sum() / z[term.name]
        loss = loss + term.coefficient * value
        sums[f"loss/{term.name}"] = value.detach()
        sums[f"count/{term.name}"] = torch.tensor(float(len(index)), device=weight.device)
        for key, metric in metrics.items():
            if not isinstance(metric, Mapping):
                sums[f"sum/{term.name}/{key}"] = metric.detach().sum()
                continue
            for name, values in metric.items():
                sums[f"sum/{term.name}/{key}/{name}"] = values.detach().sum()
                sums[f"count/{term.name}/{key}"] = torch.tensor(float(len(values)))
    return loss, sums


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """{TERM/METRIC: mean over the term's tokens, TERM/PART/METRIC: mean over the part's} from the
    sums of `evaluate` over a whole step.
    """
    names = [
        key.removeprefix("sum/") for key in sums if key.startswith("sum/") and key.count("/") >= 2
    ]

    def count(name):
        return (
            sums.get(f"count/{name.rpartition('/')[0]}") or sums[f"count/{name.partition('/')[0]}"]
        )

    return {name: sums[f"sum/{name}"] / count(name) for name in names}
