"""Numbers per token that a method brings itself, by names of its own."""

from dataclasses import replace

import numpy as np
import pytest
from wrong_cases import Right, look, loss, with_row, with_terms, wrong

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.engine.core.errors import MethodError

AGAIN = Term("again", NLL())


def by_difficulty(needs=frozenset({"difficulty"})):
    return Term("sft", loss(lambda t: -t["difficulty"] * t.logp), needs=needs)


def difficult(terms, *difficulties):
    """A method whose rows bring these as `difficulty`, one each."""

    def rows(self, batch):
        made = Right.rows(self, batch)
        pairs = zip(made, difficulties, strict=True)
        return [row.with_streams(difficulty=difficulty) for row, difficulty in pairs]

    return wrong(rows=rows, terms=lambda self, batch: list(terms))


def ramp(row):
    return np.arange(len(row.tokens), dtype=np.float32)


def test_a_number_stands_at_every_token_and_an_array_at_its_own():
    for micro_batch_tokens in (1 << 20, 1):  # together, and each row alone
        out = look(
            difficult([by_difficulty(), replace(AGAIN, coefficient=0.0)], 3.0, 0.5),
            micro_batch_tokens=micro_batch_tokens,
        )
        count = sum(int(row.trained.sum()) for row in out.rows)
        for row, gradient, expected in zip(out.rows, out.gradients, (3.0, 0.5), strict=True):
            np.testing.assert_allclose(gradient, -expected * row.trained / count, rtol=1e-6)
    out = look(difficult([by_difficulty(), AGAIN], 1.0, 1.0))
    ramped = [row.with_streams(difficulty=ramp(row)) for row in out.rows]
    assert [row.streams["difficulty"][2] for row in ramped] == [2.0, 2.0]


def test_a_stream_that_is_none_is_absent():
    row = look(with_row(lambda r: r.with_streams(mine=1.0))).rows[0]
    assert "mine" in row.streams and "mine" not in row.with_streams(mine=None).streams


@pytest.mark.parametrize(
    "method, words",
    [
        (difficult([by_difficulty(), AGAIN], None, 1.0), "row 0 .*needs 'difficulty', which"),
        (
            difficult([by_difficulty(frozenset({"dificulty"})), AGAIN], 1.0, 1.0),
            r"needs 'dificulty' \(did you mean 'difficulty'\?\).*Row.streams\['dificulty'\]",
        ),
        (
            difficult([by_difficulty(frozenset()), AGAIN], None, 1.0),
            r"NaN on tokens whose row has no difficulty.*Row.streams\['difficulty'\]",
        ),
        (with_terms(by_difficulty(frozenset()), AGAIN), "KeyError: .*no token has 'difficulty'"),
        (with_terms(by_difficulty(frozenset({"logp"})), AGAIN), "needs 'logp', expected the name"),
        (with_terms(by_difficulty(frozenset({3})), AGAIN), "needs 3, expected the name"),
        (with_row(lambda r: r.with_streams(entropy=1.0)), "brings a stream 'entropy'"),
        (with_row(lambda r: r.with_streams(segment=1.0)), "brings a stream 'segment'"),
        (with_row(lambda r: replace(r, streams={3: 1.0})), "a stream is named 3"),
    ],
)
def test_streams_that_cannot_be(method, words):
    with pytest.raises(MethodError, match=f"(?s){words}"):
        look(method)
