"""CHORD and the plain mixes of both losses: sections 1 and 13 of the methods dossier."""

import math

import numpy as np
import pytest
from method_cases import BUDGET, GRPO_LOSS, SFT_LOSS, batch, constant, half, kind_of, ramp, rollouts

from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.registry import make_method
from tandem.engine.learner.inspect import inspect
from tandem.engine.loop.reporter import latest_signals


def test_chord_mixes_two_means_with_their_own_denominators():
    out = inspect(make_method("chord_mu", {"mu": 0.25}), batch(), ramp)
    assert out.loss == pytest.approx(0.75 * GRPO_LOSS + 0.25 * SFT_LOSS, rel=1e-5)
    assert out.denominators == {"policy": 4.0, "expert": 5.0}


def test_chord_mu_decays_as_published():
    method = make_method("chord_mu", {})

    def mu(step):
        return inspect(method, batch(step=step), ramp).coefficients["expert"]

    assert (
        mu(0) == 0.9
        and mu(100) == pytest.approx(0.475)
        and mu(200) == pytest.approx(0.05) == mu(5000)
    )
    assert method.metrics(5000) == {"mu": pytest.approx(0.05)}


def test_chord_demands_only_what_has_weight():
    """Section 1(f)5: the half with weight zero is not run at all."""

    def demand(mu, signals=None):
        if signals is None:
            signals = {}
        return make_method("chord_mu", {"mu": mu}).demand(0, BUDGET, signals)

    assert [(d.prompts, d.experts) for d in map(demand, (0.0, 0.5, 1.0))] == [
        (4, 0),
        (4, 3),
        (0, 3),
    ]


def test_adaptive_mu_is_the_gap_to_a_target_reward():
    """CHORD's max(0, tau - mean reward), tau = 0.5."""
    method = make_method("chord_mu", {"mu": {"kind": "reward_gap", "peak": 0.5}})

    def mu(signals):
        return inspect(method, batch(signals=signals), ramp).coefficients["expert"]

    assert [
        mu(s) for s in ({}, {"reward/mean": 0.2}, {"reward/mean": 0.9}, {"reward/mean": -1.0})
    ] == [0.5, pytest.approx(0.3), 0.0, 0.5]
    assert method.demand(1, BUDGET, {"reward/mean": 0.9}).experts == 0
    always = make_method("chord_mu", {"mu": {"kind": "reward_gap", "peak": 1.0}})
    assert always.demand(0, BUDGET, {}).prompts == 4, (
        "a mu that reads rewards must keep making them, even at mu = 1"
    )


def test_phi_is_p_times_one_minus_p_without_gradient():
    """Section 1(g): phi(0.5) = 1/4; the gradient by log p is -p(1 - p)/N_demo exactly."""
    out = inspect(make_method("chord_phi", {"mu": 1.0}), batch(groups=()), half)
    assert out.loss == pytest.approx(0.25 * math.log(2))
    # 0.25 / 5
    np.testing.assert_allclose(out.gradients[0], [0, 0, -0.05, -0.05, -0.05], rtol=1e-6)
    out = inspect(make_method("chord_phi", {"mu": 1.0}), batch(groups=()), constant(math.log(0.9)))
    np.testing.assert_allclose(out.gradients[1], [0, -0.018, -0.018], rtol=1e-5)


def test_phi_is_symmetric_and_zero_at_the_ends():
    """Section 1(g)."""
    import torch

    from tandem.algorithms.parts.objectives.tokens import Tokens

    p = torch.tensor([1e-30, 0.2, 0.8, 1.0])
    logp = p.log().requires_grad_()
    zeros = torch.zeros(4, dtype=torch.int64)
    NLL("phi")(Tokens(logp, zeros, zeros, zeros.to(torch.int8)))[0].sum().backward()
    torch.testing.assert_close(-logp.grad, torch.tensor([0.0, 0.16, 0.16, 0.0]), atol=1e-6, rtol=0)


def test_sft_is_weighs_by_p():
    out = inspect(make_method("sft_is", {"mu": 1.0}), batch(groups=()), half)
    assert out.loss == pytest.approx(0.5 * math.log(2))
    # 0.5 / 5
    np.testing.assert_allclose(out.gradients[1], [0, -0.1, -0.1], rtol=1e-6)


def test_doubling_the_rollouts_leaves_the_expert_part_unchanged():
    """Section 1(g)."""
    one, two = (
        inspect(make_method("chord_mu", {"mu": 0.5}), batch(groups=g), ramp)
        for g in ([rollouts()], [rollouts(), rollouts(number=1)])
    )
    np.testing.assert_array_equal(one.gradients[-1], two.gradients[-1])
    assert one.terms["expert"] == two.terms["expert"]


@pytest.mark.parametrize("mu", [1.5, -0.1, {"kind": "cosine", "peak": 2.0}])
def test_mu_outside_its_range_is_refused(mu):
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        make_method("chord_mu", {"mu": mu})


def test_static_mix_by_hand():
    out = inspect(make_method("static_mix", {}), batch(step=77), ramp)
    assert out.loss == pytest.approx(0.9 * GRPO_LOSS + 0.1 * SFT_LOSS, rel=1e-5)


def test_rl_with_sft_loss_adds_the_two():
    """Section 13(a): c = 1, advantages from rollouts alone.

    Section 13(b): theirs has another scale in each half.
    """
    assert inspect(make_method("rl_with_sft", {}), batch(), ramp).loss == pytest.approx(
        GRPO_LOSS + SFT_LOSS, rel=1e-5
    )
    code = inspect(
        make_method(
            "rl_with_sft",
            {"policy": {"preset": "luffy_code", "reduction_length": 10, "entropy_bonus": 0.0}},
        ),
        batch(),
        ramp,
    )
    assert code.loss == pytest.approx(-(3 * 0.5 - 0.5) / 10 + SFT_LOSS, rel=1e-5)


def test_two_stages_have_their_own_learning_rate_and_moments():
    """Section 13."""
    method = make_method("sft_rl", {"sft_steps": 2, "sft_learning_rate": 1e-3})
    assert [inspect(method, batch(step=s), ramp).loss for s in range(3)] == pytest.approx(
        [SFT_LOSS, SFT_LOSS, GRPO_LOSS]
    )
    first, then = method.demand(1, BUDGET, {}), method.demand(2, BUDGET, {})
    assert (first.prompts, first.experts, first.learning_rate, kind_of(first)) == (
        0,
        3,
        1e-3,
        "sft",
    )
    assert (then.prompts, then.experts, then.learning_rate, kind_of(then)) == (4, 0, None, "rl")
    assert first.optimizer != then.optimizer


def test_alternating_by_hand():
    method = make_method("alternating", {"every": 3})
    assert [inspect(method, batch(step=s), ramp).loss for s in range(4)] == pytest.approx(
        [SFT_LOSS, GRPO_LOSS, GRPO_LOSS, SFT_LOSS]
    )
    demands = [method.demand(s, BUDGET, {}) for s in range(4)]
    assert [(d.prompts, d.experts, d.optimizer) for d in demands] == [
        (0, 3, "sft"),
        (4, 0, "main"),
        (4, 0, "main"),
        (0, 3, "sft"),
    ]
    assert (
        make_method("alternating", {"separate_moments": False}).demand(0, BUDGET, {}).optimizer
        == "main"
    )
    with pytest.raises(ValueError, match="every is 0"):
        make_method("alternating", {"every": 0})


def test_schedules_of_the_step():
    """Section 1(g): without warm-up the peak at 0, the valley after warm-up + decay, monotone
    between.
    """
    assert Schedule("cosine", peak=0.9, valley=0.05, decay=100)(0) == 0.9
    cosine = Schedule("cosine", peak=0.9, valley=0.05, warmup=10, decay=100)
    assert (
        cosine(0) == 0.0
        and cosine(5) == 0.45
        and cosine(10) == 0.9
        and cosine(110) == pytest.approx(0.05) == cosine(500)
    )
    assert cosine(60) == pytest.approx((0.9 + 0.05) / 2)
    values = [cosine(t) for t in range(10, 120)]
    assert values == sorted(values, reverse=True)
    assert [Schedule("step", peak=1.0, decay=2)(t) for t in range(4)] == [1, 1, 0, 0]
    assert [Schedule("periodic", peak=1.0, period=3)(t) for t in range(4)] == [1, 0, 0, 1]
    assert [Schedule("linear", peak=1.0, decay=4)(t) for t in range(6)] == [
        1,
        0.75,
        0.5,
        0.25,
        0,
        0,
    ]
    assert Schedule.parse(0.3)(99) == 0.3 and Schedule.parse(0).off and not cosine.off


def test_schedules_of_a_signal():
    gap, gate = (
        Schedule("reward_gap", peak=0.5, valley=0.05),
        Schedule("gate", peak=1.0, valley=0.1, threshold=0.25),
    )
    assert [gap(0, {"reward/mean": r}) for r in (0.0, 0.3, 0.48, 1.0, -1.0)] == pytest.approx(
        [0.5, 0.2, 0.05, 0.05, 0.5]
    )
    assert [gate(0, {"reward/mean": r}) for r in (0.0, 0.25, 0.26)] == [1.0, 1.0, 0.1]
    assert Schedule("entropy_exp", peak=0.5)(0, {"entropy": 2.0}) == pytest.approx(
        0.5 * math.exp(-2)
    )
    assert Schedule("entropy_exp", peak=0.1, rate=1.0)(0, {"entropy": 2.0}) == pytest.approx(
        0.1 * math.exp(2)
    )
    assert (
        Schedule("saturating", peak=1.0, signal="x", threshold=3.0)(0, {"x": 1.0, "grad_norm": 9.0})
        == 0.25
    )
    for kind in ("reward_gap", "gate", "entropy_exp", "saturating"):
        schedule = Schedule(kind, peak=0.7)
        assert (
            schedule(5, {})
            == schedule(5, {"reward/mean": math.nan, "entropy": math.nan, "grad_norm": math.inf})
            == 0.7
        ), "nothing known yet: the peak"


def test_a_signal_that_a_step_does_not_measure_keeps_its_last_value():
    """No reward in an SFT step, no finite gradient in a skipped one.

    At the start nothing is known.
    """
    gap, norm = Schedule("reward_gap", peak=0.5), Schedule("saturating", peak=1.0, threshold=1.0)
    signals, found = {}, []
    for metrics in (
        {"grad_norm": 1.0},
        {"grad_norm": 3.0, "reward/mean": 0.2},
        {"grad_norm": math.inf},
        {"grad_norm": math.nan, "reward/mean": 0.4},
    ):
        signals = latest_signals(signals, metrics)
        found.append((gap(0, signals), norm(0, signals)))
    assert found == [
        pytest.approx(pair) for pair in ((0.5, 0.5), (0.3, 0.75), (0.3, 0.75), (0.1, 0.75))
    ]


@pytest.mark.parametrize(
    "value, words",
    [
        ({"kind": "cosine", "warm_up": 3}, "did you mean 'warmup'"),
        ({"kind": "cosin"}, "did you mean 'cosine'"),
        ({"kind": "step", "decay": -1}, "must be >= 0"),
        ({"kind": "step", "signal": "entropy"}, "step alone"),
        ("cosine", "expected a section or a number"),
    ],
)
def test_a_wrong_schedule_is_named(value, words):
    with pytest.raises(ValueError, match=words):
        Schedule.parse(value)
