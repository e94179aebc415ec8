"""Checks of terms whose unit is a row or a group, and of their rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.units import UNITS
from tandem.algorithms.parts.reductions import NAMES, UNIT_NAMES
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Row


def check_unit(where: str, term: Term) -> None:
    """Raise MethodError unless the term's other parts go with its unit."""
    if term.unit not in UNITS:
        raise MethodError(f"{where}: its unit is {term.unit!r}, expected one of {', '.join(UNITS)}")
    known = NAMES if term.unit == "token" else UNIT_NAMES
    reduction = getattr(term.reduction, "name", None)
    if reduction in (*NAMES, *UNIT_NAMES) and reduction not in known:
        raise MethodError(
            f"{where}: its unit is {term.unit!r} and its reduction {reduction!r}, expected "
            f"{' or '.join(known)}: a term has one number per {term.unit}, and Z counts those"
        )
    if term.unit != "token" and term.correction is not None:
        raise MethodError(
            f"{where}: its unit is {term.unit!r} and it has a correction, which is one per token; "
            "leave it out, or make it part of the objective"
        )


def check_unit_rows(where: str, rows: Sequence[Row], terms: Sequence[Term]) -> None:
    """Raise MethodError unless all tokens of a row, or of a group, weigh the same in a term with
    that unit."""
    for term in terms:
        if term.unit != "token":
            check_one_weight(where, rows, term)


def check_one_weight(where: str, rows: Sequence[Row], term: Term) -> None:
    of_group: dict[int, float] = {}
    for number, row in enumerate(rows):
        weight = row.weights.get(term.name, np.zeros(1))
        weight = weight[weight != 0]
        if len(weight) == 0:
            continue
        here = f"{where}: row {number} (prompt {row.prompt_id!r})"
        if (weight != weight[0]).any():
            other = weight[weight != weight[0]][0]
            raise MethodError(
                f"{here}: weights[{term.name!r}] are {weight[0]} and {other}, expected one number "
                f"on all its tokens of the term (0 on others), whose unit is {term.unit!r}"
            )
        if term.unit != "group":
            continue
        if row.group < 0:
            raise MethodError(
                f"{here}: it is of no group (group is {row.group}), but the unit of term "
                f"{term.name!r} is 'group'; set Row.group, the same number in all rows of a group"
            )
        if of_group.setdefault(row.group, weight[0]) != weight[0]:
            raise MethodError(
                f"{here}: weights[{term.name!r}] is {weight[0]}, but {of_group[row.group]} in "
                f"another row of group {row.group}; a group has one weight, since it is the unit "
                f"of the term"
            )
