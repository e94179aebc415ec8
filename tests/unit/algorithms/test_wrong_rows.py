"""Rows that cannot be rows, and what `credit` breaks in place: errors that name the method."""

from dataclasses import replace

import numpy as np
import pytest
from wrong_cases import look, with_row, with_weights, wrong

from tandem.engine.core.errors import MethodError


def whole(row, value=1.0, dtype=np.float32):
    """The row with `value` on every trained token of its first term."""
    return with_weights(row, sft=np.where(row.weights["sft"] != 0, value, 0).astype(dtype))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda r: r.with_streams(advantage=np.ones(2)),
            r"\['advantage'\] has 2 entries, expected 5",
        ),
        (lambda r: r.with_streams(x=10**400), r"\['x'\] is a whole number too large"),
        (lambda r: r.with_streams(advantage="high"), r"\['advantage'\] has 4 entries, expected 5"),
        (lambda r: replace(r, streams=[1.0]), "Row.streams is .*expected a mapping"),
        (lambda r: r.with_streams(advantage=np.array(1.0)), r"\['advantage'\] is array"),
        (lambda r: replace(r, tokens=3), "Row.tokens is 3"),
        (lambda r: replace(r, weights=None), "Row.weights is None, expected a mapping"),
        (lambda r: replace(r, weights=["sft"]), "Row.weights is .*expected a mapping"),
        (lambda r: with_weights(r, sft=1.0), r"Row.weights\['sft'\] is 1.0"),
        (lambda r: with_weights(r, sft=None), r"Row.weights\['sft'\] is None"),
        (lambda r: with_weights(r, sft=r.weights["sft"][1:]), r"weights\['sft'\] has 4 entries"),
        (lambda r: with_weights(r, sft=np.ones(5)), r"\['sft'\]\[0\] is 1.0, must be 0"),
        (lambda r: with_weights(r, sft=np.ones((5, 2))), r"\['sft'\]\[0\] is \[1. 1.\]"),
    ],
)
def test_a_row_that_cannot_be_made(change, words):
    with pytest.raises(MethodError, match=words) as caught:
        look(with_row(change))
    assert "method Wrong: rows()" in str(caught.value)
    assert "wrong_cases.py:" in str(caught.value), "the line that made it"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: replace(r, group="a"), "group is 'a', expected the whole number"),
        (lambda r: replace(r, group=None), "group is None"),
        (lambda r: replace(r, tokens=r.tokens - 10), "a token is -9, expected ids"),
        (lambda r: whole(r, 1e300, np.float64), "1e.300 at token 2, more than float32 holds"),
        (
            lambda r: r.with_streams(advantage=np.full(5, -1e300)),
            r"\['advantage'\] is -1e.300 at token 2, more than float32 holds",
        ),
        (lambda r: r.with_streams(x=1e39), r"\['x'\] is 1e.39 at token 2, more than float32"),
        (lambda r: r.with_streams(x=-(10**60)), r"\['x'\] is -1e.60 at token 2, more than"),
        (lambda r: whole(r, 1e-60, np.float64), "1e-60 at token 2, which is 0 in float32"),
    ],
)
def test_a_row_that_cannot_be_trained(change, words):
    with pytest.raises(MethodError, match=rf"row 0 \(prompt 'e0'\): .*{words}"):
        look(with_row(change))


def in_place(change):
    """A method whose credit changes the arrays of its rows and returns the rows it was given."""

    def credit(self, rows, batch):
        for row in rows:
            change(row.weights)
        return rows

    return wrong(credit=credit)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda w: w["sft"].__setitem__(-1, np.nan), r"\['sft'\] is nan"),
        (lambda w: w["sft"].fill(1), r"\['sft'\] is 1.0 at token 0, expected 0"),
        (lambda w: w.update(sft=w["sft"][1:]), r"\['sft'\] has shape"),
        (lambda w: w.update(sft=[0.0] * 5), r"\['sft'\] is a list"),
        (lambda w: w.update(other=w["sft"]), "'other', which is no term"),
    ],
)
def test_what_credit_breaks_in_place(change, words):
    with pytest.raises(MethodError, match=rf"method Wrong: credit\(\): row 0.*{words}"):
        look(in_place(change))


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2)])
def test_a_number_at_every_token_may_be_changed_in_place(number):
    first = look(with_row(lambda r: r.with_streams(x=number))).rows[0]
    first.streams["x"][1:] *= 0.25
    assert first.streams["x"].tolist() == [2.0, 0.5, 0.5, 0.5, 0.5]


def test_unknown_and_unlimited_numbers_of_a_stream_stay():
    for number in (np.nan, np.inf):
        look(with_row(lambda r, number=number: r.with_streams(x=number)))


def test_what_credit_may_change_in_place():
    assert look(in_place(lambda w: w["sft"].__imul__(2))).terms["sft"] == pytest.approx(
        2 * np.log(2), rel=1e-5
    )


@pytest.mark.parametrize(
    "change",
    [lambda rows: rows.clear(), lambda rows: rows.append(rows[0]), lambda rows: rows.pop()],
)
def test_rows_that_credit_takes_from_its_list(change):
    def credit(self, rows, batch):
        change(rows)
        return rows

    with pytest.raises(MethodError, match=r"credit\(\) returned \d rows for 2"):
        look(wrong(credit=credit))
