"""Proximal SFT, method 9 of the catalogue: r = 1 before the first update gives SFT's gradient; a
token above the upper bound has none; one below the lower bound keeps its own.
"""

import numpy as np
import pytest
from method_cases import BUDGET, EXPERTS, batch, ids, look

from tandem.algorithms.base import Demand
from tandem.algorithms.registry import make_method

PSFT = make_method("psft", {"clip_low": 0.2, "clip_high": 0.28})


def at(ratio):
    """log-probs of before the update, from the ratios of a row's last tokens; 1 for all others."""

    def old(row):
        found = ids(row).copy()
        found[-len(ratio) :] -= np.log(ratio).astype(np.float32)
        return found

    return old


def test_before_the_first_update_the_gradient_is_that_of_sft():
    ours = look(PSFT, batch(groups=()), ids)
    sft = look(make_method("sft", {}), batch(groups=()), ids)
    for found, expected in zip(ours.gradients, sft.gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert ours.loss == pytest.approx(-1.0)


def test_by_hand():
    """Three expert tokens with ratios 1.3, 0.5, 1.2: -(1.28 + 0.5 + 1.2)/3; of the first, above
    1.28, no gradient, of the others -r/3, also of the one below 0.8.
    """
    three = (EXPERTS[0],)
    assert len(three[0].tokens) - 2 == 3
    out = look(PSFT, batch(groups=(), experts=three), ids, old=at([1.3, 0.5, 1.2]))
    assert out.loss == pytest.approx(-(1.28 + 0.5 + 1.2) / 3, rel=1e-5)
    np.testing.assert_allclose(out.gradients[0][-3:], [0, -0.5 / 3, -1.2 / 3], rtol=1e-5)
    assert out.metrics["sft/clip_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("ranks, tokens", [(1, 1 << 20), (1, 6), (2, 6)])
def test_micro_batches_and_ranks_change_nothing(ranks, tokens):
    old = at([1.3, 0.7])
    whole = look(PSFT, batch(groups=()), ids, old=old)
    parts = look(PSFT, batch(groups=()), ids, old=old, ranks=ranks, micro_batch_tokens=tokens)
    assert parts.loss == pytest.approx(whole.loss)
    for found, expected in zip(parts.gradients, whole.gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_step_is_so_many_updates_of_its_batch():
    method = make_method("psft", {"updates": 4})
    assert method.demand(0, BUDGET, {}) == Demand(experts=BUDGET.experts, updates=4)
