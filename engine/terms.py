"""Terms: from per-token losses to the loss of a step, with denominators counted over the whole global batch.

    L = sum_term coefficient * ( sum_rows sum_t weight * scale * correction * objective ) / Z_term

The same `evaluate` serves the learner on a GPU and anyone who wants a method's loss on hand-made numbers.
"""
from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from tandem.algorithms.base import Term
from tandem.algorithms.objectives import Tokens
from tandem.engine.method_checks import GIVEN_STREAMS, MethodError, kind
from tandem.engine.types import MicroBatch, Row

ON_REQUEST = ("entropy", "value")       # a term that does not name them in `needs` does not see them


def row_counts(rows: Sequence[Row], term: str) -> np.ndarray:
    """int [rows]: how many tokens each row has in `term`."""
    return np.array([int((row.weights[term] != 0).sum()) if term in row.weights else 0 for row in rows], np.int64)


def denominators(terms: Sequence[Term], rows: Sequence[Row]) -> dict[str, float]:
    """Z of every term over all rows of the step. Raises ValueError if a row uses a term that the method did not declare."""
    known = {term.name for term in terms}
    for row in rows:
        if stray := set(row.weights) - known:
            raise ValueError(f"rows of prompt {row.prompt_id!r} carry weights for {sorted(stray)}, but the method's terms are {sorted(known)}")
    return {term.name: term.reduction.denominator(row_counts(rows, term.name)) for term in terms}


def streams(micro: MicroBatch, logp: torch.Tensor, entropy: torch.Tensor | None = None, value: torch.Tensor | None = None,
            extra: Mapping[str, torch.Tensor] = {}) -> Tokens:
    """The objective's view of a micro-batch. logp, entropy, the critic's value and a custom forward's extra streams: float32 [n] on the compute device."""
    tensor = lambda name: torch.as_tensor(micro.streams[name], device=logp.device) if name in micro.streams else None
    return Tokens(logp=logp, segment=torch.as_tensor(micro.segment, device=logp.device), group=torch.as_tensor(micro.group, device=logp.device),
                  source=torch.as_tensor(micro.source, device=logp.device), advantage=tensor("advantage"), old_logp=tensor("old_logp"),
                  behaviour_logp=tensor("behaviour_logp"), ref_logp=tensor("ref_logp"), entropy=entropy,
                  value=value, old_value=tensor("old_value"), returns=tensor("returns"), extra=extra)


def evaluate(terms: Sequence[Term], z: Mapping[str, float], micro: MicroBatch, tokens: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the step's loss, and sums for the report.

    Returns (loss, sums): `loss` is a scalar attached to everything that any rank may differentiate even when no token here belongs to any term (a rank
    without rows still has to run its whole backward pass, or collectives of the other ranks would wait for ever). `sums` are detached scalars to be added up over micro-batches
    and ranks: `loss/TERM` (already divided by Z), `count/TERM` (tokens), `sum/TERM/METRIC` (token sums, divided by the count at the end, see `means`), and the
    same of `TERM/PART` where an objective reports on some of its tokens.
    """
    attached = [tokens.logp, tokens.value, *tokens.extra.values(), tokens.entropy if any("entropy" in term.needs for term in terms) else None]
    loss = sum(stream.sum() * 0.0 for stream in attached if stream is not None)
    sums: dict[str, torch.Tensor] = {}
    for term in terms:
        if term.name not in micro.weights:
            continue
        weight = torch.as_tensor(micro.weights[term.name], device=tokens.logp.device)
        index = torch.as_tensor(np.flatnonzero(micro.weights[term.name]), device=weight.device)       # found on the host: nobody waits for a GPU
        if len(index) == 0:
            continue
        chosen = asked_for(term, tokens.take(index))
        per_token, metrics = losses(term, chosen)
        check_given(term, micro, chosen, per_token)
        factor = weight[index] * torch.as_tensor(micro.scale[term.name], device=weight.device)[index]
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


def asked_for(term: Term, tokens: Tokens) -> Tokens:
    """The tokens with the streams that the term may see. Raises MethodError if one it needs is absent.

    What is made on request only is hidden from a term that did not ask, or it would see it in some
    runs (another term asked, or learner.entropy is on) and not in others.
    """
    for need in term.needs:
        if need not in tokens.extra and getattr(tokens, need, None) is None:
            raise MethodError(f"term {term.name!r} needs {need!r}, which this step does not have (see docs/methods.md on streams)")
    return replace(tokens, **{name: None for name in ON_REQUEST if name not in term.needs})


def losses(term: Term, tokens: Tokens) -> tuple[torch.Tensor, Mapping]:
    """(loss [n], metrics) of the term's objective on its n tokens. Raises MethodError if it returns anything else."""
    where, n = f"term {term.name!r}: its objective", len(tokens.logp)
    try:
        result = term.objective(tokens)
    except (TypeError, AttributeError, KeyError) as error:
        absent = [name for name in Tokens.__dataclass_fields__ if getattr(tokens, name) is None]
        if not absent:
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise MethodError(f"{where} raised {type(error).__name__}: {error}\nat {frame.filename}:{frame.lineno}, in {frame.name}. "
                          f"Streams it does not have here: {', '.join(absent)}; the term must name in `needs` what it reads of "
                          "entropy, value, old_value, returns and ref_logp, and rows must bring their advantage") from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise MethodError(f"{where} returned {kind(result)}, expected a pair: loss [n], {{name: [n]}} (an empty mapping reports nothing)")
    loss, metrics = result
    check_tensor(f"{where}: its loss", loss, n)
    if not torch.is_floating_point(loss):
        raise MethodError(f"{where}: its loss has dtype {loss.dtype}, expected a floating-point one")
    check_attached(where, term, tokens, loss)
    if not isinstance(metrics, Mapping):
        raise MethodError(f"{where}: its metrics are {kind(metrics)}, expected a mapping {{name: [n]}} (an empty one reports nothing)")
    for name, metric in metrics.items():
        check_metric(f"{where}: metric {name!r}", metric, n)
    return loss, metrics


def check_attached(where: str, term: Term, tokens: Tokens, loss: torch.Tensor) -> None:
    """A loss without a graph trains nothing. Where it is 0 on every token there is nothing to train."""
    inputs = [tokens.logp, tokens.entropy, tokens.value, *tokens.extra.values()]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if differentiable and not loss.requires_grad and term.coefficient != 0 and bool(loss.any()):
        raise MethodError(f"{where}: its loss carries no gradient, so it would train nothing: it must be computed from tokens.logp (or entropy, value) "
                          "without detach(), item(), numpy() or torch.no_grad() on the way")


def check_given(term: Term, micro: MicroBatch, tokens: Tokens, loss: torch.Tensor) -> None:
    """Rows without an advantage (or returns) beside rows that have one are NaN there: fine for an objective that does not look, else its loss is NaN.

    The device is only asked where the host knows that something is missing.
    """
    mine = np.flatnonzero(micro.weights[term.name])
    for name in GIVEN_STREAMS:
        missing = np.isnan(micro.streams[name][mine]) if name in micro.streams else np.zeros(0, bool)
        if not missing.any():
            continue
        at = torch.as_tensor(missing, device=loss.device)
        if bool((at & loss.isnan() & tokens.logp.isfinite()).any()):
            raise MethodError(f"term {term.name!r}: its objective is NaN on tokens whose row has no {name}, while other rows of the term have one; "
                              f"set Row.{name} in all of them, or give these rows a term of their own")


def check_metric(where: str, metric, n: int) -> None:
    if not isinstance(metric, Mapping):
        check_tensor(where, metric, n)
        return
    lengths = {name: len(values) if isinstance(values, torch.Tensor) and values.dim() else None for name, values in metric.items()}
    for name, values in metric.items():
        check_tensor(f"{where}: {name!r}", values, lengths[next(iter(lengths))] or 0)


def check_tensor(where: str, found, n: int) -> None:
    """Raise MethodError if `found` is no real tensor of shape [n]. Another shape would broadcast to the tokens, and depend on the micro-batch."""
    if not isinstance(found, torch.Tensor):
        raise MethodError(f"{where} is {kind(found)}, expected a torch tensor of shape [{n}], one number per token")
    if found.shape != (n,):
        raise MethodError(f"{where} has shape {list(found.shape)}, expected [{n}]: one number per token, not summed, averaged or unsqueezed")
    if found.is_complex():
        raise MethodError(f"{where} has dtype {found.dtype}, expected real numbers")


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """{TERM/METRIC: mean over the term's tokens, TERM/PART/METRIC: mean over the part's} from the sums of `evaluate` over a whole step."""
    names = [key.removeprefix("sum/") for key in sums if key.startswith("sum/") and key.count("/") >= 2]
    count = lambda name: sums.get(f"count/{name.rpartition('/')[0]}") or sums[f"count/{name.partition('/')[0]}"]
    return {name: sums[f"sum/{name}"] / count(name) for name in names}
