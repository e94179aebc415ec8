"""Checks of what a method hands over: demand, terms, rows, metrics. A wrong method stops the run
in its first step; it never trains wrongly without a word.

Every check raises MethodError, which names the method and, where there is one, the term. What an
objective returns is checked where it is called, in engine/terms.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral

import numpy as np

from tandem.algorithms.base import Demand, Method, Term
from tandem.algorithms.objectives import Tokens
from tandem.engine.config import ConfigError, closest
from tandem.engine.types import GenRequest, Row

# {array of a Row: the kinds of numpy dtype it may have}
ROW_ARRAYS = {
    "tokens": "iu",
    "source": "iu",
    "version": "iu",
    "advantage": "fiub",
    "behaviour_logp": "fiub",
    "old_logp": "fiub",
    "ref_logp": "fiub",
    "old_value": "fiub",
    "returns": "fiub",
}
WEIGHT_KINDS = "fiub"
KIND_NAMES = {"iu": "integers", "fiub": "real numbers"}
KNOWN_STREAMS = (*Tokens.__dataclass_fields__, "old")
CRITIC_STREAMS = ("value", "old_value")
GIVEN_STREAMS = ("advantage", "returns")  # a method fills them in itself, in rows or credit


class MethodError(ConfigError):
    """A method (usually the user's own) that hands over what cannot be trained on, or an
    objective that returns no loss per token: one screen, exit code 2, no traceback."""


def title(method: Method) -> str:
    return f"method {type(method).__name__}"


@contextmanager
def naming(method: Method) -> Iterator[None]:
    """Put the method's name before a MethodError of code that does not know it, the learner's."""
    try:
        yield
    except MethodError as error:
        raise MethodError(f"{title(method)}, {error}") from error


# -- before the rollouts ------------------------------------------------------------------------


def check_demand(method: Method, demand: Demand) -> Demand:
    """The demand, if it is one that can be met."""
    where = f"{title(method)}: demand()"
    if not isinstance(demand, Demand):
        raise MethodError(f"{where} returned {kind(demand)}, expected a Demand{no_return(demand)}")
    for name in ("prompts", "experts"):
        count = getattr(demand, name)
        if not isinstance(count, Integral) or count < 0:
            raise MethodError(f"{where} asks for {name}={count!r}, expected a whole number >= 0")
    if demand.experts and not (method.uses_experts or method.aligned):
        raise MethodError(
            f"{where} asks for {demand.experts} demonstrations, but the method's uses_experts is "
            "False, so none are read; write `uses_experts: ClassVar[bool] = True` in its class"
        )
    return demand


def check_request(method: Method, request: GenRequest) -> GenRequest:
    """The rollout request, if it is one."""
    if not isinstance(request, GenRequest):
        raise MethodError(
            f"{title(method)}: request() returned {kind(request)}, "
            f"expected a GenRequest{no_return(request)}"
        )
    return request


def check_accept(method: Method, accepted: bool) -> bool:
    """The answer of `accept`. None would redraw every group until the prompts are used up."""
    if accepted is None:
        raise MethodError(
            f"{title(method)}: accept() returned None, expected True or False{no_return(None)}"
        )
    return bool(accepted)


# -- terms --------------------------------------------------------------------------------------


def check_terms(method: Method, terms: Sequence[Term]) -> list[Term]:
    """The terms as a list, if the learner can evaluate every one of them."""
    where = f"{title(method)}: terms()"
    check_list(where, terms, Term)
    seen = set()
    for term in terms:
        check_term(f"{where}: term {term.name!r}", term, method)
        if term.name in seen:
            raise MethodError(
                f"{where} returned two terms named {term.name!r}: each needs a name "
                "of its own, since it is the key into Row.weights"
            )
        seen.add(term.name)
    return list(terms)


def check_term(where: str, term: Term, method: Method) -> None:
    if not isinstance(term.name, str) or not term.name:
        raise MethodError(f"{where}: its name must be a word, the key into Row.weights")
    for name in ("objective", "correction"):
        part = getattr(term, name)
        if isinstance(part, type):
            raise MethodError(
                f"{where}: its {name} is the class {part.__name__}, expected an "
                f"object of it: write {part.__name__}(), with brackets"
            )
        if not callable(part) and (name == "objective" or part is not None):
            raise MethodError(f"{where}: its {name} is {kind(part)}, expected something callable")
    for name in ("row_scale", "denominator"):
        if isinstance(term.reduction, type) or not hasattr(term.reduction, name):
            raise MethodError(
                f"{where}: its reduction is {term.reduction!r}, expected a Reduction, "
                "e.g. Reduction('token_mean')"
            )
    check_coefficient(where, term.coefficient)
    check_needs(where, term, method)


def check_coefficient(where: str, coefficient: float) -> None:
    try:
        number = None if isinstance(coefficient, str) else float(coefficient)
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise MethodError(
            f"{where}: its coefficient is {coefficient!r}, expected a number; a "
            "Schedule becomes one with schedule(batch.step, batch.signals)"
        )
    if not np.isfinite(number):
        raise MethodError(f"{where}: its coefficient is {number}, expected a finite number")


def check_needs(where: str, term: Term, method: Method) -> None:
    """Streams that this run has. With a forward of the method's own any name may be one."""
    if isinstance(term.needs, str):
        raise MethodError(
            f"{where}: its needs is the text {term.needs!r}, expected a set of "
            f"names: frozenset({{{term.needs!r}}})"
        )
    for need in term.needs:
        if need not in KNOWN_STREAMS and method.forward is None:
            raise MethodError(
                f"{where}: it needs {need!r}, which is no stream"
                f"{closest(str(need), KNOWN_STREAMS)}; known: {', '.join(KNOWN_STREAMS)}"
            )
        own_value = need == "value" and method.forward is not None
        if need in CRITIC_STREAMS and not method.critic and not own_value:
            raise MethodError(
                f"{where}: it needs {need!r}, which a critic gives, but the method "
                "has none; set method.policy.advantage=gae (preset ppo), or give "
                "the class `critic = True`"
            )


# -- rows ---------------------------------------------------------------------------------------


def check_rows(method: Method, rows: Sequence[Row], terms: Sequence[Term]) -> list[Row]:
    """The rows as a list, if the packer can take every one of them."""
    where = f"{title(method)}: rows()"
    check_list(where, rows, Row)
    for number, row in enumerate(rows):
        check_row(label(where, number, row), row, terms)
    if rows and not any(row.weights for row in rows):
        names = ", ".join(term.name for term in terms)
        raise MethodError(
            f"{where}: none of its {len(rows)} rows has weights for a term, so nothing would be "
            f"trained; give them Row.weights {{term: one number per token}}, terms: {names}"
        )
    return list(rows)


def check_credit(
    method: Method, before: Sequence[Row], rows: Sequence[Row], terms: Sequence[Term]
) -> list[Row]:
    """The rows that `credit` returned: as many as it was given, those it changed checked again."""
    where = f"{title(method)}: credit()"
    check_list(where, rows, Row)
    if len(rows) != len(before):
        raise MethodError(
            f"{where} returned {len(rows)} rows for {len(before)}; expected one for "
            "each, in the same order. To drop a row give it weights of 0"
        )
    for number, (old, row) in enumerate(zip(before, rows, strict=True)):
        if row is not old:
            check_row(label(where, number, row), row, terms)
    for term in terms:
        for need in GIVEN_STREAMS:
            if need in term.needs:
                check_given(method, rows, term, need)
    return list(rows)


def check_row(where: str, row: Row, terms: Sequence[Term]) -> None:
    length = len(row.tokens)
    for name, kinds in ROW_ARRAYS.items():
        array = getattr(row, name)
        if array is not None:
            check_array(f"{where}: {name}", array, length, kinds)
    if not isinstance(row.weights, Mapping):
        raise MethodError(
            f"{where}: weights is {kind(row.weights)}, expected a mapping "
            "{term: one number per token}"
        )
    names = [term.name for term in terms]
    for name, weight in row.weights.items():
        check_array(f"{where}: weights[{name!r}]", weight, length, WEIGHT_KINDS)
        if not np.isfinite(weight).all():
            raise MethodError(
                f"{where}: weights[{name!r}] is {first_bad(weight)}, expected "
                "finite numbers (0: the token is not part of the term)"
            )
        if name not in names:
            raise MethodError(
                f"{where}: it has weights for {name!r}, which is no term of this step"
                f"{closest(str(name), names)}; terms: {', '.join(names) or 'none'}"
            )
    if row.advantage is not None and not np.isfinite(row.advantage[row.trained]).all():
        bad = first_bad(np.where(row.trained, row.advantage, 0.0))
        raise MethodError(
            f"{where}: advantage is {bad}, which is trained; expected finite numbers "
            "(0: the token counts, but is not pushed)"
        )


def check_array(where: str, array: np.ndarray, length: int, kinds: str) -> None:
    if not isinstance(array, np.ndarray):
        raise MethodError(
            f"{where} is {kind(array)}, expected a numpy array of shape ({length},): "
            "one number per token of the row"
        )
    if array.shape != (length,):
        raise MethodError(
            f"{where} has shape {array.shape}, expected ({length},): one number per "
            "token of the row"
        )
    if array.dtype.kind not in kinds:
        raise MethodError(f"{where} has dtype {array.dtype}, expected {KIND_NAMES[kinds]}")


def check_given(method: Method, rows: Sequence[Row], term: Term, need: str) -> None:
    """Every row of the term has the stream that its objective needs and the method gives."""
    for number, row in enumerate(rows):
        weight = row.weights.get(term.name)
        if weight is None or not weight.any():
            continue
        stream = getattr(row, need)
        if stream is None or not np.isfinite(stream[weight != 0]).all():
            where = label(title(method), number, row)
            raise MethodError(
                f"{where}: term {term.name!r} needs {need!r}, which the row lacks on "
                f"some of the term's tokens; set Row.{need} in rows() or credit()"
            )


def check_metrics(method: Method, metrics: Mapping[str, float]) -> dict[str, float]:
    """What `metrics` reports, if it is numbers by name."""
    where = f"{title(method)}: metrics()"
    if not isinstance(metrics, Mapping):
        raise MethodError(
            f"{where} returned {kind(metrics)}, expected {{name: number}}{no_return(metrics)}"
        )
    for name, value in metrics.items():
        try:
            float(value)
        except (TypeError, ValueError):
            raise MethodError(f"{where}: {name!r} is {value!r}, expected a number") from None
    return dict(metrics)


def check_state(method: Method) -> None:
    """The method can be saved: without `return` a resume would start its state over."""
    state = method.state_dict()
    if not isinstance(state, Mapping):
        raise MethodError(
            f"{title(method)}: state_dict() returned {kind(state)}, expected a "
            f"mapping{no_return(state)}"
        )


# -- words --------------------------------------------------------------------------------------


def check_list(where: str, found, item: type) -> None:
    """`found` is a list or tuple of `item`. A generator is used up by the first look at it."""
    if isinstance(found, item):
        raise MethodError(f"{where} returned one {item.__name__}, expected a list: [...]")
    if not isinstance(found, (list, tuple)):
        raise MethodError(
            f"{where} returned {kind(found)}, expected a list of {item.__name__}{no_return(found)}"
        )
    for number, one in enumerate(found):
        if isinstance(one, type) or not isinstance(one, item):
            raise MethodError(
                f"{where} returned a list whose entry {number} is {kind(one)}, "
                f"expected {item.__name__}"
            )


def has_tokens(row: Row, term: str) -> bool:
    return term in row.weights and bool(np.any(row.weights[term] != 0))


def label(where: str, number: int, row: Row) -> str:
    return f"{where}: row {number} (prompt {row.prompt_id!r})"


def kind(found) -> str:
    if found is None:
        return "None"
    if isinstance(found, type):
        return f"the class {found.__name__}"
    return f"a {type(found).__name__}"


def no_return(found) -> str:
    if found is None:
        return ": does it end without `return`?"
    if isinstance(found, Iterator):
        return ": it is used up by the first look at it, write list(...) around it"
    return ""


def first_bad(values: np.ndarray) -> str:
    place = int(np.flatnonzero(~np.isfinite(values))[0])
    return f"{values[place]} at token {place}"
