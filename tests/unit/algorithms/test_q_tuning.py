"""Scores of the present model before the update: Q-Tuning, row 18 of the catalogue, and what
`probes` may ask for.
"""

from dataclasses import dataclass

import numpy as np
import pytest
from method_cases import look
from wrong_cases import Right

from tandem.algorithms.base import Batch
from tandem.algorithms.checks.terms import ask_probes
from tandem.algorithms.registry import make_method
from tandem.engine.core.errors import MethodError
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.model.quantities import Entropy

# nll and entropy of every token of four demonstrations: both high, Q2, both low, Q4
NLL = {20: 3.0, 30: 2.5, 40: 0.5, 50: 0.4}
ENTROPY = {20: 2.0, 30: 0.1, 40: 0.2, 50: 1.5}
EXPERTS = tuple(
    trajectory([1], [first, first + 1, first + 2, first + 3], expert=True, prompt_id=f"p{first}")
    for first in NLL
)
BATCH = Batch(0, (), EXPERTS)


def of_row(numbers):
    """A number per row; its tokens differ by 0.01 from each other, the first is the highest."""

    def per_token(row):
        base = numbers[int(row.tokens[1])]
        return np.float32(base) - 0.01 * np.arange(len(row.tokens), dtype=np.float32)

    return per_token


def tuned(**options):
    nll = of_row(NLL)
    return look(
        make_method("q_tuning", options),
        BATCH,
        logp=lambda row: -nll(row),
        extra={"old_entropy": of_row(ENTROPY)},
    )


def test_noise_and_what_is_known_are_dropped():
    """Confident errors and calibration rows stay; tokens go in the former only."""
    out = tuned(keep_rows=0.5, keep_tokens=0.5)
    trained = [row.trained.tolist() for row in out.rows]
    assert trained[0] == trained[2] == [False] * 5
    assert trained[3] == [False, True, True, True, True]
    # the two with the lowest local perplexity, the last ones
    assert trained[1] == [False, False, False, True, True]
    count = 6
    for row, gradient in zip(out.rows, out.gradients, strict=True):
        np.testing.assert_allclose(gradient, -(row.trained / count), rtol=1e-6)
    other = tuned(keep_rows=0.5, keep_tokens=0.5, keep_low=False)
    assert other.rows[1].trained.tolist() == [False, True, True, False, False]


def test_with_whole_budgets_it_is_sft():
    out = tuned(keep_rows=1.0, keep_tokens=1.0)
    nll = of_row(NLL)
    plain = look(make_method("sft", {}), BATCH, logp=lambda row: -nll(row))
    assert out.loss == plain.loss
    for a, b in zip(out.gradients, plain.gradients, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [0.125, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_kept_rows_are_the_budget_on_any_batch(share, n):
    method = make_method("q_tuning", {"keep_rows": share})
    rng = np.random.default_rng(n)
    for values in (rng.random((2, n)), np.ones((2, n))):  # the second: all ties
        kept, _ = method.choose(*values, [f"p{i}" for i in range(n)])
        assert kept.sum() == max(1, round(share * n))


def test_the_level_is_that_of_the_bisection():
    """The paper's search: one alpha for both quantiles, until Q2 and Q4 hold the budget."""
    rng = np.random.default_rng(3)
    perplexity, entropy = rng.random(40), rng.random(40)
    kept, q2 = make_method("q_tuning", {"keep_rows": 0.25}).choose(
        perplexity, entropy, [f"p{i:02}" for i in range(40)]
    )

    def quadrants(alpha):
        low_p, high_p = np.quantile(perplexity, [alpha, 1 - alpha])
        low_e, high_e = np.quantile(entropy, [alpha, 1 - alpha])
        confident_errors = (perplexity >= high_p) & (entropy <= low_e)
        calibration = (perplexity <= low_p) & (entropy >= high_e)
        return confident_errors, calibration

    low, high = 0.0, 0.5
    for _ in range(40):
        middle = (low + high) / 2
        if np.logical_or(*quadrants(middle)).sum() > kept.sum():
            high = middle
        else:
            low = middle
    confident_errors, calibration = quadrants(low)
    found = confident_errors | calibration
    # rows that come in at the same level are missed by the search
    assert not (found & ~kept).any() and kept.sum() - found.sum() <= 1
    np.testing.assert_array_equal(confident_errors, found & q2)


def test_local_perplexity_by_hand():
    """Tokens 1, 9, 2, 3: scores 5, 5.25, 4 and 2.5 with half from the neighbours."""
    method = make_method("q_tuning", {"keep_tokens": 0.5})
    assert method.clean(np.array([1.0, 9.0, 2.0, 3.0])).tolist() == [2, 3]
    assert method.clean(np.array([4.0])).tolist() == [0]


@dataclass
class Probing(Right):
    asks: object = None

    def probes(self, batch):
        return self.asks


@pytest.mark.parametrize(
    "asks, words",
    [
        (None, r"probes\(\) returned None, expected a mapping"),
        ([Entropy()], r"probes\(\) returned a list, expected a mapping"),
        ({"entropy": Entropy()}, "'entropy': tokens have something else of that name"),
        ({"mine": Entropy}, "'mine' is the class Entropy, expected a Quantity"),
    ],
)
def test_probes_that_cannot_be(asks, words):
    with pytest.raises(MethodError, match=f"method Probing: .*{words}"):
        ask_probes(Probing(asks=asks), BATCH)


@pytest.mark.parametrize(
    "options, words",
    [({"keep_rows": 0}, "keep_rows is 0"), ({"lam": 2}, "lam is 2")],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        make_method("q_tuning", options)
