"""Checks of the rows that a method hands over, in `rows` and again in `credit`.

Every check raises MethodError, which names the method, the row and the array.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral

import numpy as np

from tandem.algorithms.base import Batch, Method, Term, quantities_of
from tandem.algorithms.checks.method import check_list, kind, no_return, real, short, title
from tandem.algorithms.checks.models import check_views
from tandem.algorithms.checks.terms import ENGINE_NAMES
from tandem.algorithms.checks.units import check_unit_rows
from tandem.algorithms.parts.objectives.tokens import (
    MODEL_STREAMS,
    SCORED_STREAMS,
    TOKEN_FIELDS,
)
from tandem.engine.config.names import model_of
from tandem.engine.core.errors import CarrierError, MethodError
from tandem.engine.core.text import closest
from tandem.engine.core.types import Row, ScoredGroup

# kinds of numpy dtype
INTEGERS = "iu"
REAL_NUMBERS = "fiub"
KIND_NAMES = {INTEGERS: "integers", REAL_NUMBERS: "real numbers"}

# what `score` leaves as it is, beside the trajectories
SCORE_KEEPS = ("step", "experts", "signals", "off_policy", "budget")
SCORE_KEEPS_OF_GROUPS = ("group", "prompt", "outcomes", "texts", "earlier")


def ask_score(method: Method, batch: Batch) -> Batch:
    """What the method's `score` returns, if nothing but rewards changed: those of the samples, and
    of the prompt's demonstration.
    """
    where = f"{title(method)}: score()"
    found = method.score(batch)
    if not isinstance(found, Batch):
        raise MethodError(f"{where} returned {kind(found)}, expected a Batch{no_return(found)}")
    if len(found.groups) != len(batch.groups):
        raise MethodError(
            f"{where} returned {len(found.groups)} groups for {len(batch.groups)}; expected the "
            "same ones in the same order, with other rewards"
        )
    for before, group in zip(batch.groups, found.groups, strict=True):
        check_rewards(f"{where}: group {before.group}", before, group)
    for name in SCORE_KEEPS:
        if getattr(found, name) != getattr(batch, name):
            raise MethodError(
                f"{where} changed the batch's {name}; expected the same batch with other rewards: "
                "dataclasses.replace(batch, groups=...)"
            )
    return found


def check_rewards(where: str, before: ScoredGroup, group: ScoredGroup) -> None:
    if not isinstance(group, ScoredGroup):
        raise MethodError(f"{where} became {kind(group)}, expected a ScoredGroup")
    if group.trajectories is not before.trajectories:
        raise MethodError(
            f"{where}: its trajectories are others than before; expected the same ones: "
            "dataclasses.replace(group, rewards=...)"
        )
    for name in SCORE_KEEPS_OF_GROUPS:
        if getattr(group, name) != getattr(before, name):
            raise MethodError(
                f"{where}: its {name} changed; expected the same group with other rewards: "
                "dataclasses.replace(group, rewards=...)"
            )
    reward = group.demonstration_reward
    number = real(reward)
    if reward is not None and (number is None or not np.isfinite(number)):
        raise MethodError(
            f"{where}: demonstration_reward is {short(reward)}, expected a finite number, or None"
        )
    check_array(f"{where}: rewards", group.rewards, len(group.trajectories), REAL_NUMBERS, "sample")
    check_numbers(f"{where}: rewards", group.rewards, "expected finite numbers", "sample")


def ask_rows(method: Method, batch: Batch) -> Sequence[Row]:
    """What the method's `rows` returns."""
    with naming_rows(method, "rows()"):
        return method.rows(batch)


def ask_credit(
    method: Method, rows: Sequence[Row], batch: Batch, terms: Sequence[Term]
) -> list[Row]:
    """The rows that `credit` returned, checked again: it may have changed arrays in place.

    It gets a list of its own, so that what it does to that list is not lost on the comparison.
    """
    with naming_rows(method, "credit()"):
        found = method.credit(list(rows), batch)
    return check_credit(method, rows, found, terms)


@contextmanager
def naming_rows(method: Method, function: str) -> Iterator[None]:
    """Say which method made a Row that cannot be one, and where in its file."""
    try:
        yield
    except CarrierError as error:
        made_at = line_of(error, getattr(type(method), function.removesuffix("()")))
        raise MethodError(f"{title(method)}: {function}: {error}{made_at}") from error


def line_of(error: Exception, function) -> str:
    """The line of the function's file that an error came through, the last one."""
    file = getattr(getattr(function, "__code__", None), "co_filename", None)
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename == file]
    if not frames:
        return ""
    return f" (made at {frames[-1].filename}:{frames[-1].lineno})"


def check_rows(method: Method, rows: Sequence[Row], terms: Sequence[Term]) -> list[Row]:
    """The rows as a list, if the packer can take every one of them."""
    where = f"{title(method)}: rows()"
    check_list(where, rows, Row)
    for number, row in enumerate(rows):
        check_row(label(where, number, row), row, terms)
    if rows and not any(row.weights for row in rows):
        names = ", ".join(term.name for term in terms) or "none"
        raise MethodError(
            f"{where}: none of its {len(rows)} rows has weights for a term, so nothing would be "
            f"trained; give them Row.weights {{term: one number per token}}, terms: {names}"
        )
    check_unit_rows(where, rows, terms)
    for term in terms:
        for need in sorted(term.needs):
            if need in SCORED_STREAMS or model_of(need) is not None:
                check_own_scores(where, rows, term, need)
    return list(rows)


def check_own_scores(where: str, rows: Sequence[Row], term: Term, need: str) -> None:
    """Rows may bring what a model would say of them, of all tokens of the term."""
    for number, row in enumerate(rows):
        if need not in row.streams or term.name not in row.weights:
            continue
        unknown = np.isnan(row.streams[need]) & (row.weights[term.name] != 0)
        if unknown.any():
            raise MethodError(
                f"{label(where, number, row)}: streams[{need!r}] is NaN at token "
                f"{unknown.argmax()}, but term {term.name!r} needs it there; give a number at all "
                "of the term's tokens, or leave the stream out: the model is then asked"
            )


def check_credit(
    method: Method, before: Sequence[Row], rows: Sequence[Row], terms: Sequence[Term]
) -> list[Row]:
    """The rows that `credit` returned, if they are as many as it was given."""
    where = f"{title(method)}: credit()"
    check_list(where, rows, Row)
    if len(rows) != len(before):
        raise MethodError(
            f"{where} returned {len(rows)} rows for {len(before)}; expected one for "
            "each, in the same order. To drop a row give it weights of 0"
        )
    for number, row in enumerate(rows):
        check_row(label(where, number, row), row, terms)
    check_unit_rows(where, rows, terms)
    check_quantity_names(where, rows, terms)
    for term in terms:
        read = {name for quantity in term.quantities.values() for name in quantity.data}
        for need in sorted({*term.needs, *read}):
            if need not in ENGINE_NAMES:
                check_given(method, rows, term, need)
    return list(rows)


def check_quantity_names(where: str, rows: Sequence[Row], terms: Sequence[Term]) -> None:
    quantities = quantities_of(terms)
    for number, row in enumerate(rows):
        for name in quantities.keys() & row.streams.keys():
            raise MethodError(
                f"{label(where, number, row)}: it brings a stream {name!r}, which a term has as "
                "the name of a quantity; rename one of them"
            )


def check_row(where: str, row: Row, terms: Sequence[Term]) -> None:
    length = len(row.tokens)
    for name in ("tokens", "source", "version"):
        array = getattr(row, name)
        if array is not None:
            check_array(f"{where}: {name}", array, length, INTEGERS)
    for name, stream in row.streams.items():
        check_stream_name(where, name)
        check_array(f"{where}: streams[{name!r}]", stream, length, REAL_NUMBERS)
        check_range(f"{where}: streams[{name!r}]", stream, row.trained)
    if (row.tokens < 0).any():
        raise MethodError(f"{where}: a token is {row.tokens.min()}, expected ids of the vocabulary")
    if not isinstance(row.group, Integral):
        raise MethodError(
            f"{where}: group is {row.group!r}, expected the whole number of its group "
            "(batch.groups[i].group), or -1 for a row of none"
        )
    if not isinstance(row.role, str):
        raise MethodError(f"{where}: role is {row.role!r}, expected a word, or '' for none")
    check_weights(where, row, terms)
    check_views(where, row, terms)
    advantage = row.streams.get("advantage")
    if advantage is not None:
        check_numbers(
            f"{where}: streams['advantage']",
            np.where(row.trained, advantage, 0),
            "which is trained; expected finite numbers (0: the token counts, but is not pushed)",
        )


def check_stream_name(where: str, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise MethodError(f"{where}: a stream is named {name!r}, expected a word")
    if name in (*TOKEN_FIELDS, *MODEL_STREAMS):
        raise MethodError(
            f"{where}: it brings a stream {name!r}, a name that tokens have for something "
            "else; choose another"
        )


def check_weights(where: str, row: Row, terms: Sequence[Term]) -> None:
    names = [term.name for term in terms]
    for name, weight in row.weights.items():
        here = f"{where}: weights[{name!r}]"
        check_array(here, weight, len(row.tokens), REAL_NUMBERS)
        check_numbers(
            here, weight, "expected finite numbers (0: the token is not part of the term)"
        )
        check_vanished(here, weight)
        if weight[0] != 0:
            raise MethodError(
                f"{here} is {weight[0]} at token 0, expected 0: the first token has no log-prob, "
                "so it cannot be trained"
            )
        if name not in names:
            raise MethodError(
                f"{where}: it has weights for {name!r}, which is no term of this step"
                f"{closest(str(name), names)}; terms: {', '.join(names) or 'none'}"
            )


def check_array(where: str, array: np.ndarray, length: int, kinds: str, unit="token") -> None:
    """One number per `unit` of a row or group."""
    if not isinstance(array, np.ndarray):
        raise MethodError(
            f"{where} is {kind(array)}, expected a numpy array of shape ({length},): "
            f"one number per {unit}"
        )
    if array.shape != (length,):
        raise MethodError(
            f"{where} has shape {array.shape}, expected ({length},): one number per {unit}"
        )
    if array.dtype.kind not in kinds:
        raise MethodError(f"{where} has dtype {array.dtype}, expected {KIND_NAMES[kinds]}")


def check_numbers(where: str, values: np.ndarray, expected: str, unit="token") -> None:
    """All are finite in float32, which is what the learner gets."""
    with np.errstate(over="ignore"):
        bad = ~np.isfinite(values.astype(np.float32, copy=False))
    if not bad.any():
        return
    first = int(np.flatnonzero(bad)[0])
    found = f"{values[first]} at {unit} {first}"
    if np.isfinite(values[first]):
        found += ", more than float32 holds"
    raise MethodError(f"{where} is {found}, {expected}")


def check_range(where: str, stream: np.ndarray, trained: np.ndarray) -> None:
    """No trained token's number becomes infinite in float32; NaN and inf stay what they are."""
    if stream.dtype.kind != "f" or stream.itemsize <= 4:
        return
    with np.errstate(over="ignore"):
        beyond = trained & np.isfinite(stream) & np.isinf(stream.astype(np.float32))
    if beyond.any():
        first = int(beyond.argmax())
        raise MethodError(
            f"{where} is {stream[first]} at token {first}, more than float32 holds, which is what "
            "the learner gets"
        )


def check_vanished(where: str, weight: np.ndarray) -> None:
    """A weight that is 0 in float32 only would be counted in Z and train nothing."""
    if weight.dtype.kind != "f" or weight.itemsize <= 4:
        return
    vanished = (weight != 0) & (weight.astype(np.float32) == 0)
    if vanished.any():
        first = int(vanished.argmax())
        raise MethodError(
            f"{where} is {weight[first]} at token {first}, which is 0 in float32, what the learner "
            "gets; set it to 0, for a token that is not part of the term, or to a larger number"
        )


def check_given(method: Method, rows: Sequence[Row], term: Term, need: str) -> None:
    """Every row of the term has the stream that its objective needs and the method gives."""
    given = {name for row in rows for name in row.streams}
    if need not in given and method.forward is not None:
        return  # it may be one of the forward's
    for number, row in enumerate(rows):
        weight = row.weights.get(term.name)
        if weight is None or not weight.any():
            continue
        stream = row.streams.get(need)
        if stream is None or not np.isfinite(stream[weight != 0]).all():
            where = label(title(method), number, row)
            known = sorted({*given, *MODEL_STREAMS, *SCORED_STREAMS} - {need})
            raise MethodError(
                f"{where}: term {term.name!r} needs {need!r}{closest(need, known)}, which the row "
                f"lacks on some of the term's tokens; set Row.streams[{need!r}] in rows() or "
                "credit()"
            )


def has_tokens(row: Row, term: str) -> bool:
    return term in row.weights and bool(np.any(row.weights[term] != 0))


def label(where: str, number: int, row: Row) -> str:
    return f"{where}: row {number} (prompt {row.prompt_id!r})"
