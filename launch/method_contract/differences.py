"""What differs between two looks at one batch, or between two driven runs, in words; '' where
nothing does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tandem.algorithms.base import Demand
from tandem.engine.core.types import Row
from tandem.engine.learner.inspect import Inspection, describe
from tandem.launch.method_contract.driving import Driven

Key = tuple[int, str, tuple[int, ...]]  # group, role and tokens of a row


def of_runs(ours: Sequence[Driven], theirs: Sequence[Driven]) -> str:
    """To the bit, of equally many steps from 0 on."""
    assert len(ours) == len(theirs) > 0
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        found = of_steps(a, b)
        if found:
            return f"step {step}: {found}"
    return ""


def of_steps(a: Driven, b: Driven) -> str:
    found = of_demands(a.demand, b.demand)
    if found:
        return found
    if len(a.rows) != len(b.rows):
        return f"{len(a.rows)} rows, then {len(b.rows)}"
    for i, (row, other) in enumerate(zip(a.rows, b.rows, strict=True)):
        found = of_rows(row, other)
        if found:
            return f"row {i}: {found}"
    if not same(a.loss, b.loss):
        return f"the loss is {a.loss:.7g}, then {b.loss:.7g}"
    for i, (gradient, other) in enumerate(zip(a.gradients, b.gradients, strict=True)):
        if not np.array_equal(gradient, other, equal_nan=True):
            return f"the gradient of row {i} is {shown(gradient)}, then {shown(other)}"
    return of_numbers(a.metrics, b.metrics)


def of_demands(a: Demand, b: Demand) -> str:
    for field in dataclasses.fields(Demand):
        one = getattr(a, field.name)
        other = getattr(b, field.name)
        if one != other:
            return f"demand() asks for {field.name}={one!r}, then {other!r}"
    return ""


def of_rows(row: Row, other: Row) -> str:
    if not np.array_equal(row.tokens, other.tokens):
        return f"its tokens are {row.tokens.tolist()}, then {other.tokens.tolist()}"
    if row.weights.keys() != other.weights.keys():
        return f"it has weights for {sorted(row.weights)}, then for {sorted(other.weights)}"
    for name, weight in row.weights.items():
        other_weight = other.weights[name]
        if not np.array_equal(weight, other_weight):
            return f"its weights for {name!r} are {shown(weight)}, then {shown(other_weight)}"
    return ""


def of_numbers(a: Mapping[str, float], b: Mapping[str, float]) -> str:
    for name in sorted(a.keys() | b.keys()):
        one = a.get(name)
        other = b.get(name)
        if one is None or other is None or not same(one, other):
            return f"metric {name!r} is {one}, then {other}"
    return ""


def same(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def of_looks(whole: Inspection, other: Inspection) -> str:
    """Up to rounding, whatever the order of the rows."""
    if whole.denominators != other.denominators:
        return f"Z is {whole.denominators}, then {other.denominators}"
    if not near(whole.loss, other.loss):
        return f"the loss is {whole.loss:.7g}, then {other.loss:.7g}"
    if whole.terms.keys() != other.terms.keys():
        return f"the terms are {sorted(whole.terms)}, then {sorted(other.terms)}"
    for name, value in whole.terms.items():
        other_value = other.terms[name]
        if not near(value, other_value):
            return f"term {name!r} is {value:.7g}, then {other_value:.7g}"
    if len(whole.rows) != len(other.rows):
        return f"{len(whole.rows)} rows, then {len(other.rows)}"
    ours = by_row(whole)
    theirs = by_row(other)
    for row in whole.rows:
        key = key_of(row)
        if key not in theirs:
            return f"{describe(row)} of group {row.group} is missing"
        our_gradient = ours[key]
        their_gradient = theirs[key]
        if not np.allclose(their_gradient, our_gradient, rtol=1e-4, atol=1e-7):
            change = f"{shown(our_gradient)}, then {shown(their_gradient)}"
            return f"the gradient of {describe(row)} is {change}"
    return ""


def near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-6)


def by_row(out: Inspection) -> dict[Key, np.ndarray]:
    """The gradient of each row; copies of a row add up."""
    found: dict[Key, np.ndarray] = {}
    for row, gradient in zip(out.rows, out.gradients, strict=True):
        key = key_of(row)
        so_far = found.get(key, np.zeros_like(gradient))
        found[key] = so_far + gradient
    return found


def key_of(row: Row) -> Key:
    return row.group, row.role, tuple(row.tokens.tolist())


def shown(values: np.ndarray) -> str:
    numbers = [f"{value:.4g}" for value in values.tolist()]
    return f"[{', '.join(numbers)}]"
