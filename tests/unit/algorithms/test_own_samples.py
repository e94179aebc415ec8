"""RAFT and NFT, section 7 of the dossier on distillation and hints; samples of older weights."""

import numpy as np
import pytest
from method_cases import batch, constant, ids, look, ramp

from tandem.algorithms.registry import make_method
from tandem.engine.learner.by_hand import group, trajectory


def four(*rewards, **more):
    """One group of samples of 1, 2, 3 and 4 tokens."""
    rollouts = [trajectory([1], range(5, 6 + k), [-1.0] * (k + 1)) for k in range(4)]
    return batch(groups=[group(rollouts, rewards)], experts=(), **more)


def weights(out):
    """What each row's tokens weigh on grad log pi, times Z."""
    z = next(iter(out.denominators.values()))
    return [-gradient[-1] * z for gradient in out.gradients]


def lower_by(ratio):
    """Log-probs at which every token's ratio is this."""
    return lambda row: ramp(row) - np.float32(np.log(ratio))


def test_raft_is_sft_on_the_right_samples():
    out = look(make_method("raft", {}), four(0, 1, 1, 0), ramp)
    assert weights(out) == pytest.approx([0, 1, 1, 0])
    assert out.denominators["own"] == 2 + 3
    assert out.loss == pytest.approx(((0.2 + 0.3) + (0.2 + 0.3 + 0.4)) / 5)


def test_raft_per_all_is_smaller_by_the_acceptance():
    """Check 7.3: of 10 tokens 5 are accepted."""
    accepted = look(make_method("raft", {}), four(0, 1, 1, 0), ramp)
    every = look(make_method("raft", {"per": "all"}), four(0, 1, 1, 0), ramp)
    assert every.loss == pytest.approx(accepted.loss * 5 / 10)
    for a, b in zip(every.gradients, accepted.gradients, strict=True):
        np.testing.assert_allclose(a, b / 2, rtol=1e-6)
    assert look(make_method("raft", {}), four(0, 0, 0, 0), ramp).loss == 0.0


@pytest.mark.parametrize(
    "normalize, right, wrong",
    [("std", 1.7321, -0.5774), ("none", 1.0, -1 / 3), ("linear", 0.75, -0.25)],
)
def test_nft_weighs_as_grpo_before_the_first_update(normalize, right, wrong):
    """Check 7.2: r = 1/4; std gives the advantages with the population's standard deviation."""
    out = look(make_method("nft", {"normalize": normalize}), four(0, 0, 1, 0), ramp)
    assert weights(out) == pytest.approx([wrong, wrong, right, wrong], rel=1e-3)


def test_nft_by_hand_after_an_update():
    """R = 2 on every token, r = 1/4: left = (1 - 1/2)/(3/4) = 2/3, its gradient -r R/(1 - r R)."""
    method = make_method("nft", {"normalize": "none"})
    out = look(method, four(0, 0, 1, 0), ramp, old=lower_by(2.0))
    expected = (3 * -np.log(2.0) + 7 * -np.log(2 / 3)) / 10
    assert out.loss == pytest.approx(expected, rel=1e-5)
    assert weights(out) == pytest.approx([-1.0, -1.0, 1.0, -1.0], rel=1e-4)


def test_below_the_floor_the_value_is_clamped_and_the_gradient_is_not():
    """R = 3.8: left = 1/15, floor 0.1; d(-log y) = r R / (1 - r) / 0.1."""
    method = make_method("nft", {"normalize": "none", "floor": 0.1})
    out = look(method, four(0, 0, 1, 0), ramp, old=lower_by(3.8))
    assert weights(out)[0] == pytest.approx(-0.25 * 3.8 / 0.75 / 0.1, rel=1e-4)


def test_nft_leaves_out_groups_that_tell_nothing():
    for rewards in ((0, 0, 0, 0), (1, 1, 1, 1)):
        assert not look(make_method("nft", {}), four(*rewards), ids).rows


def test_nft_compares_with_the_policy_that_sampled():
    """Samples at log p = -1 of older weights, now at R = 2, as in the test by hand."""
    method = make_method("nft", {"normalize": "none"})
    now = constant(-1.0 + np.log(2.0))
    stale = look(method, four(0, 0, 1, 0, off_policy=True), now)
    assert stale.metrics["policy/ratio"] == pytest.approx(2.0)
    assert stale.loss == pytest.approx((3 * -np.log(2.0) + 7 * -np.log(2 / 3)) / 10, rel=1e-5)
    assert look(method, four(0, 0, 1, 0), now).metrics["policy/ratio"] == 1.0


@pytest.mark.parametrize("name", ["raft", "srft"])
def test_older_samples_weigh_by_their_ratio(name):
    """At log p = -1 when sampled: a token weighs min(2, p / e^-1) of what it would."""
    method = make_method(name, {})
    fresh = look(method, four(0, 1, 1, 0), ramp)
    stale = look(method, four(0, 1, 1, 0, off_policy=True), ramp)
    for row, before, now in zip(stale.rows, fresh.gradients, stale.gradients, strict=True):
        weight = np.minimum(2.0, np.exp(ramp(row) + 1.0))
        np.testing.assert_allclose(now, before * weight, rtol=1e-5)
