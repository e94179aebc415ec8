"""Checks of what an objective returns, made where it is called: in the learner, and in `inspect`.

Nothing here makes a GPU wait for the host in the normal case: shapes and types are known without
its numbers, which are asked for only where something is already known to be missing.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tandem.algorithms.base import Term, quantities_of
from tandem.algorithms.checks.method import kind
from tandem.algorithms.parts.objectives.tokens import (
    MODEL_STREAMS,
    PARTIAL_STREAMS,
    SCORED_STREAMS,
    Tokens,
)
from tandem.algorithms.parts.objectives.units import Groups, Units
from tandem.engine.config.names import model_of
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import MicroBatch

Seen: TypeAlias = Tokens | Units | Groups  # what an objective is called with, by the term's unit
READ_AS = {
    "token": "tokens['advantage']",
    "row": "units['advantage'] or units.sum('advantage')",
    "group": "groups.rows['advantage'] or groups.of(ROLE).sum('advantage')",
}
# the same once another term asked for them: else rows bring their own
HIDDEN_IF_ASKED = ("old_value",)  # and what other models give


def visible_streams(term: Term, terms: Sequence[Term], tokens: Tokens) -> Tokens:
    """The tokens with the streams that the term may see. Raises MethodError if one is absent.

    What is made on request only is hidden from a term that did not ask. Else it would see it in
    some runs (another term asked, or learner.entropy is on) and not in others, or on some rows and
    not on others.
    """
    for need in term.needs:
        if need not in tokens:
            raise MethodError(
                f"term {term.name!r} needs {need!r}, which this step does not have "
                "(see docs/methods.md on streams)"
            )
    hidden: set[str] = set(MODEL_STREAMS)
    for other in terms:
        for need in other.needs:
            if need in HIDDEN_IF_ASKED or model_of(need) is not None:
                hidden.add(need)
    hidden -= term.needs
    hidden |= quantities_of(terms).keys() - term.quantities.keys()
    if hidden.isdisjoint(tokens.streams):
        return tokens
    seen = {name: stream for name, stream in tokens.streams.items() if name not in hidden}
    return replace(tokens, streams=seen)


def check_vocabulary(micro: MicroBatch, size: int) -> None:
    """Raise MethodError for a token that the model does not have: on a GPU the lookup would end
    the process, and name nothing. Looked at on the host."""
    arrays = [micro.tokens, micro.target, *(bins.tokens for bins in micro.views.values())]
    largest = max(int(array.max(initial=0)) for array in arrays)
    if largest >= size:
        raise MethodError(
            f"a row has the token {largest}, expected ids below {size}, the model's vocabulary"
        )


def objective_losses(term: Term, seen: Seen, logp: Tensor) -> tuple[Tensor, Mapping]:
    """(loss [n], metrics) of the term's objective on its n tokens, or of its n rows or groups.
    `logp` are those of its tokens. Raises MethodError if it returns anything else."""
    where, n, unit = f"term {term.name!r}: its objective", len(seen), term.unit
    result = call_objective(where, term, seen)
    if not isinstance(result, tuple) or len(result) != 2:
        raise MethodError(
            f"{where} returned {kind(result)}, expected a pair: loss [n], {{name: [n]}} "
            "(an empty mapping reports nothing)"
        )
    loss, metrics = result
    check_tensor(f"{where}: its loss", loss, n, unit)
    if not torch.is_floating_point(loss):
        raise MethodError(
            f"{where}: its loss has dtype {loss.dtype}, expected a floating-point one"
        )
    if loss.device != logp.device:
        raise MethodError(
            f"{where}: its loss is on the device {loss.device}, expected {logp.device}, "
            "that of tokens.logp; make tensors with device=tokens.logp.device"
        )
    check_attached(where, term, seen, loss)
    if not isinstance(metrics, Mapping):
        raise MethodError(
            f"{where}: its metrics are {kind(metrics)}, expected a mapping {{name: [n]}} "
            "(an empty one reports nothing)"
        )
    for name, metric in metrics.items():
        check_metric(f"{where}: metric {name!r}", metric, n, unit)
    return loss, metrics


def call_objective(where: str, term: Term, seen: Seen):
    """What the objective returns. An error that an absent stream (None) causes says so."""
    try:
        return term.objective(seen)
    except (TypeError, AttributeError, KeyError) as error:
        known = (*MODEL_STREAMS, *SCORED_STREAMS, "advantage", "returns", "behaviour_logp")
        absent = [name for name in known if name not in seen]
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise MethodError(
            f"{where} raised {type(error).__name__}: {error}\n"
            f"at {frame.filename}:{frame.lineno}, in {frame.name}. Streams are read "
            f"as {READ_AS[term.unit]}. Streams it does not have here: {', '.join(absent)}; the "
            "term must name in `needs` what it reads of entropy, value, old_value, ref_logp and "
            "old_logp (tokens.old needs no asking), and rows must bring all others"
        ) from error


def tokens_of(seen: Seen) -> Tokens:
    if isinstance(seen, Groups):
        seen = seen.rows
    return seen if isinstance(seen, Tokens) else seen.tokens


def check_attached(where: str, term: Term, seen: Seen, loss: Tensor) -> None:
    """A loss without a graph trains nothing. Where it is 0 everywhere there is nothing to train."""
    tokens = tokens_of(seen)
    attached = any(one.requires_grad for one in (tokens.logp, *tokens.streams.values()))
    if loss.requires_grad or not attached or not torch.is_grad_enabled():
        return
    if term.coefficient != 0 and bool(loss.any()):
        raise MethodError(
            f"{where}: its loss carries no gradient, so it would train nothing: it must be "
            "computed from tokens.logp (or entropy, value) without detach(), item(), numpy() or "
            "torch.no_grad() on the way"
        )


def check_missing_streams(term: Term, micro: MicroBatch, seen: Seen, loss: Tensor) -> None:
    """Rows without a stream of the method's own beside rows that have it are NaN there: fine for an
    objective that does not look at it, else its loss is NaN."""
    mine = np.flatnonzero(micro.weights[term.name])
    for name in micro.streams:
        if name in (*SCORED_STREAMS, *PARTIAL_STREAMS):
            continue
        missing = np.isnan(micro.streams[name][mine])
        if not missing.any():
            continue
        known = tokens_of(seen).logp.isfinite()
        if not isinstance(seen, Tokens):
            missing = np.bincount(seen.unit_of_token, missing) > 0
            known = known.all()
        at = torch.as_tensor(missing, device=loss.device)
        if bool((at & loss.isnan() & known).any()):
            raise MethodError(
                f"term {term.name!r}: its objective is NaN on {term.unit}s whose row has no "
                f"{name}, while other rows of the term have one; set Row.streams[{name!r}] in all "
                "of them, or give these rows a term of their own"
            )


def check_metric(where: str, metric, n: int, unit: str) -> None:
    """A metric is [n], or {part: [m]}, all parts of one length."""
    if not isinstance(metric, Mapping):
        check_tensor(where, metric, n, unit)
        return
    length = None
    for name, values in metric.items():
        if length is None:
            length = len(values) if isinstance(values, Tensor) and values.dim() else 0
        check_tensor(f"{where}: {name!r}", values, length, unit)


def check_tensor(where: str, found, n: int, unit: str = "token") -> None:
    """Raise MethodError if `found` is no real tensor of shape [n]. Another shape would broadcast to
    the units, and the result would depend on the micro-batch."""
    if not isinstance(found, Tensor):
        raise MethodError(
            f"{where} is {kind(found)}, expected a torch tensor of shape [{n}], "
            f"one number per {unit}"
        )
    if found.shape != (n,):
        raise MethodError(
            f"{where} has shape {list(found.shape)}, expected [{n}]: one number per {unit}, "
            "not summed, averaged or unsqueezed"
        )
    if found.is_complex():
        raise MethodError(f"{where} has dtype {found.dtype}, expected real numbers")
