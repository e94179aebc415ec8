"""Checks of terms, of the quantities that they and the method's probes ask for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.checks.method import check_list, kind, no_return, real, short, title
from tandem.algorithms.checks.models import asked_models, check_models, check_probed_models
from tandem.algorithms.checks.units import check_unit
from tandem.algorithms.parts.objectives.tokens import (
    MODEL_STREAMS,
    PARTIAL_STREAMS,
    SCORED_STREAMS,
    TOKEN_FIELDS,
)
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Row
from tandem.engine.model.quantities import Quantity

QUANTITY_PARTS = ("models", "data", "value", "slope")
ENGINE_NAMES = (*TOKEN_FIELDS, *MODEL_STREAMS, *SCORED_STREAMS, *PARTIAL_STREAMS, "target")
CRITIC_STREAMS = ("value", "old_value")


def check_terms(method: Method, terms: Sequence[Term], models: Collection[str] = ()) -> list[Term]:
    """The terms as a list, if the learner can evaluate every one of them. models: names of those
    that can be asked, () where they are not known.
    """
    where = f"{title(method)}: terms()"
    check_list(where, terms, Term)
    seen = set()
    found = []
    for term in terms:
        check_term(f"{where}: term {term.name!r}", term, method)
        check_models(f"{where}: term {term.name!r}", asked_models(term), models)
        if term.name in seen:
            raise MethodError(
                f"{where} returned two terms named {term.name!r}: each needs a name "
                "of its own, since it is the key into Row.weights"
            )
        seen.add(term.name)
        found.append(replace(term, coefficient=real(term.coefficient)))
    check_same_quantities(where, found)
    return found


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
    check_unit(where, term)
    check_coefficient(where, term.coefficient)
    check_needs(where, term, method)
    check_quantities(where, term)


def check_coefficient(where: str, coefficient: float) -> None:
    number = real(coefficient)
    if number is None:
        raise MethodError(
            f"{where}: its coefficient is {short(coefficient)}, expected a number; a "
            "Schedule becomes one with schedule(batch.step, batch.signals)"
        )
    if not np.isfinite(number):
        raise MethodError(f"{where}: its coefficient is {number}, expected a finite number")
    if getattr(coefficient, "requires_grad", False):
        raise MethodError(
            f"{where}: its coefficient is a tensor with a gradient, which no optimizer follows; "
            "write coefficient.item() for its present value"
        )


def check_needs(where: str, term: Term, method: Method) -> None:
    """Streams that this run can have. That rows bring their own is checked after `credit`."""
    if isinstance(term.needs, str):
        raise MethodError(
            f"{where}: its needs is the text {term.needs!r}, expected a set of "
            f"names: frozenset({{{term.needs!r}}})"
        )
    if not isinstance(term.needs, Collection):
        raise MethodError(
            f"{where}: its needs is {kind(term.needs)}, expected a set of names; frozenset() "
            "for none"
        )
    for need in term.needs:
        if not isinstance(need, str) or need in (*TOKEN_FIELDS, "old"):
            raise MethodError(
                f"{where}: it needs {need!r}, expected the name of a stream; "
                f"{', '.join(TOKEN_FIELDS)} and old are always there"
            )
        own_value = need == "value" and method.forward is not None
        if need in CRITIC_STREAMS and not method.critic and not own_value:
            raise MethodError(
                f"{where}: it needs {need!r}, which a critic gives, but the method "
                "has none; set method.policy.advantage=gae (preset ppo), or give "
                "the class `critic = True`"
            )


def check_quantities(where: str, term: Term) -> None:
    if not isinstance(term.quantities, Mapping):
        raise MethodError(
            f"{where}: its quantities are {kind(term.quantities)}, expected a mapping "
            "{name: Quantity}"
        )
    check_each_quantity(f"{where}: its quantity", term.quantities)


def check_each_quantity(where: str, quantities: Mapping[str, Any]) -> None:
    for name, quantity in quantities.items():
        here = f"{where} {name!r}"
        if not isinstance(name, str) or name in ENGINE_NAMES:
            raise MethodError(f"{here}: tokens have something else of that name; choose another")
        lacking = [part for part in QUANTITY_PARTS if not hasattr(quantity, part)]
        if isinstance(quantity, type) or lacking:
            raise MethodError(
                f"{here} is {kind(quantity)}, expected a Quantity, e.g. "
                "Divergence('reference', beta=0.0)"
            )


def ask_probes(method: Method, batch: Batch, rows: Sequence[Row] = ()) -> Mapping[str, Quantity]:
    """What the method's `probes` returns, if it can be asked of these rows."""
    where = f"{title(method)}: probes()"
    probes = method.probes(batch)
    if not isinstance(probes, Mapping):
        raise MethodError(
            f"{where} returned {kind(probes)}, expected a mapping {{name: Quantity}}"
            f"{no_return(probes)}"
        )
    check_each_quantity(f"{where}:", probes)
    check_probed_models(f"{where}:", probes, batch.budget.models)
    for row in rows:
        for name in probes.keys() & row.streams.keys():
            raise MethodError(
                f"{where}: {name!r} is the name of a stream that a row of prompt "
                f"{row.prompt_id!r} brings; choose another"
            )
    return probes


def check_same_quantities(where: str, terms: Sequence[Term]) -> None:
    """Each is computed once, so a name has one meaning in a step."""
    seen: dict[str, Any] = {}
    for term in terms:
        for name, quantity in term.quantities.items():
            if seen.setdefault(name, quantity) != quantity:
                raise MethodError(
                    f"{where}: term {term.name!r} asks for {name!r} = {quantity}, another term for "
                    f"{seen[name]} by the same name; give them two names"
                )
