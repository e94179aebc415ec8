"""Methods whose demonstration joins its prompt's group: SRFT, LUFFY, ViSurf. Sections 2, 7 and 9 of
the methods dossier.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import (
    BUDGET,
    as_expert,
    batch,
    by_source,
    constant,
    half,
    look,
    ramp,
    rollouts,
    without_rollouts,
)

from tandem.algorithms.parts.objectives.nll import EntropyWeightedNLL, SelfReinforce
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Finish, Prompt, Sampling, Source
from tandem.engine.learner.inspect import inspect

DEMO = [5, 6, 3]


def with_demo(rewards, demo_reward=1.0, **more):
    return rollouts(rewards, demo=DEMO, demo_reward=demo_reward, **more)


# -- LUFFY, section 7


def test_luffy_by_hand():
    """Rewards 1, 0 and 1 for the demonstration, no std: A = 1/3, -2/3, 1/3. Z = 3 + 1 + 3. At p =
    1/2 a demonstration token weighs A 0.1 0.5/0.6^2.
    """
    out = look(make_method("luffy", {}), batch(groups=[with_demo((1, 0))], experts=()), half)
    f, weight = 0.5 / 0.6, 0.1 * 0.5 / 0.36
    assert out.terms["policy"] == pytest.approx(
        (-3 * (1 / 3) + 2 / 3 - 3 * (1 / 3) * f) / 7, rel=1e-5
    )
    for gradient, expected in zip(
        out.gradients, ([-1 / 21] * 3, [2 / 21], [-weight / 21] * 3), strict=True
    ):
        np.testing.assert_allclose(gradient[1:], expected, rtol=1e-5)
    assert out.coefficients["entropy"] == 0.01 and out.denominators["entropy"] == 7.0, (
        "the bonus covers the expert's tokens as well"
    )


@pytest.mark.parametrize("split", [{}, {"micro_batch_tokens": 1, "ranks": 2}])
def test_luffy_reports_each_source_by_its_own_tokens(split):
    """Demonstration tokens have p = 0.1, 0.2, 0.6: mean 0.3, whatever the four of the rollouts
    have, of which three of four (A > 0, ratio e^0.5) are clipped.
    """

    def logp(row):
        p = np.full(len(row.tokens), 0.5, np.float32)
        p[row.source == Source.EXPERT] = [0.1, 0.2, 0.6][: int((row.source == Source.EXPERT).sum())]
        return np.log(p)

    def old(row):
        return logp(row) - 0.5 * (row.streams["advantage"] > 0)

    out = inspect(
        make_method("luffy", {}),
        batch(groups=[with_demo((1, 0))]),
        logp,
        entropy=constant(0.3),
        old=old,
        **split,
    )
    expected = {
        "policy/expert/p": 0.3,
        "policy/rollout/clip_fraction": 3 / 4,
        "policy/rollout/ppo_kl": -0.5 * 3 / 4,
        "policy/expert_share": 3 / 7,
        "policy/rollout_share": 4 / 7,
    }
    assert out.metrics == pytest.approx(expected, rel=1e-5)
    alone = inspect(
        make_method("luffy", {}), batch(groups=[rollouts()]), logp, entropy=constant(0.3), **split
    ).metrics
    assert (
        not any("expert" in name for name in alone) and alone["policy/rollout/clip_fraction"] == 0
    )


def test_luffy_as_code_divides_by_the_response_limit_and_does_not_clip():
    method = make_method("luffy", {"as": "code", "policy": {"reduction_length": 10}})
    out = inspect(
        method,
        batch(groups=[with_demo((1, 0))]),
        lambda r: half(r) + 0.5,
        old=half,
        entropy=constant(0.3),
    )
    p = 0.5 * math.exp(0.5)
    for gradient, expected in zip(
        out.gradients,
        ([-math.exp(0.5) / 30] * 3, [2 * math.exp(0.5) / 30], [-0.1 * p / (p + 0.1) ** 2 / 30] * 3),
        strict=True,
    ):
        np.testing.assert_allclose(gradient[1:], expected, rtol=1e-5)
    assert out.coefficients["entropy"] == 0.001
    with pytest.raises(ValueError, match="length"):
        make_method("luffy", {"as": "code"})
    with pytest.raises(ValueError, match="paper, code"):
        make_method("luffy", {"as": "codee"})


def test_luffy_shaping_is_largest_at_gamma():
    """Section 7(g): d loss/d log p = -A g p/(p + g)^2 / Z, A/4 at p = g."""

    def gradient(p, gamma=0.1):
        out = look(
            make_method("luffy", {"gamma": gamma}),
            batch(groups=[with_demo((0, 0))]),
            constant(math.log(p)),
        )
        return by_source(out, Source.EXPERT)[0][1] * -7

    a = 1 - 1 / 3
    assert gradient(0.1) == pytest.approx(a / 4, rel=1e-5) and gradient(0.05) < gradient(
        0.1
    ) > gradient(0.2)
    assert gradient(0.3) == pytest.approx(a * 0.1 * 0.3 / 0.16, rel=1e-5) and gradient(
        0.3, None
    ) == pytest.approx(a * 0.3, rel=1e-5)


def test_luffy_fades_where_all_is_solved_and_is_strongest_where_nothing_is():
    """Section 7(g) and 7(f)2: advantages sum to 0; demonstration 0 if all are right, 7/8 beside
    seven failures (2.47 with std).
    """
    from method_cases import aligned

    method = make_method("luffy", {})
    rows = method.rows(batch(groups=[aligned([0, 1, 0, 2], 1.0)]))
    assert sum(
        row.streams["advantage"].max() + row.streams["advantage"].min() for row in rows
    ) == pytest.approx(0, abs=1e-6)
    solved = look(method, batch(groups=[with_demo((1, 1))]))
    assert not any(g.any() for g in solved.gradients)
    eight = replace(
        with_demo((0, 0)),
        trajectories=with_demo((0, 0)).trajectories[:1] * 7,
        rewards=np.zeros(7, np.float32),
    )
    assert method.rows(batch(groups=[eight]))[-1].streams["advantage"][-1] == pytest.approx(7 / 8)
    with_std = (
        make_method("luffy", {"policy": "grpo"})
        .rows(batch(groups=[eight]))[-1]
        .streams["advantage"][-1]
    )
    assert with_std == pytest.approx(math.sqrt(8) * 7 / 8, rel=1e-4)


def test_luffy_keeps_the_groups_size():
    method, sampling = make_method("luffy", {}), Sampling(8)

    def prompt(demo):
        return Prompt("p", np.array([1], np.int32), "", {}, demo)

    assert (
        method.request(0, prompt(np.array(DEMO)), sampling, 0, BUDGET).samples == BUDGET.samples - 1
    )
    assert method.request(0, prompt(None), sampling, 0, BUDGET).samples == BUDGET.samples


def test_the_expert_is_left_out_of_rollout_correction_and_kl():
    """Section 0.4: no behaviour log-prob, no truncated weight; KL is an expectation under the
    policy.
    """
    method = make_method(
        "luffy", {"policy": {"advantage": "dr_grpo", "correction": "token", "kl": 0.1}}
    )
    out = look(method, batch(groups=[with_demo((0, 0), behaviour=-3.0)]), constant(-1.0))
    plain = look(
        make_method("luffy", {"policy": {"advantage": "dr_grpo"}}),
        batch(groups=[with_demo((0, 0), behaviour=-3.0)]),
        constant(-1.0),
    )
    np.testing.assert_array_equal(
        by_source(out, Source.EXPERT)[0], by_source(plain, Source.EXPERT)[0]
    )
    assert out.denominators["kl"] == 4.0


@pytest.mark.parametrize("name", ["luffy", "visurf"])
def test_dynamic_sampling_judges_the_group_with_its_demonstration(name):
    method = make_method(name, {"policy": "dapo"})
    assert method.accept(with_demo((0, 0))), (
        "all rollouts fail, the demonstration does not: that is a signal"
    )
    assert not method.accept(with_demo((1, 1))) and not method.accept(rollouts((0, 0)))


# -- ViSurf, section 9


def test_visurf_by_hand():
    """Rewards 0, 0 and 1 for y: mean 1/3, unbiased std 1/sqrt(3): A = -1/sqrt(3) twice, A_y =
    2/sqrt(3) = G/sqrt(G + 1).

    Means over 3, 1 and 3 tokens, then over the three.
    """
    out = look(make_method("visurf", {}), batch(groups=[with_demo((0, 0))]))
    low, high = 1 / math.sqrt(3), 2 / math.sqrt(3)
    for gradient, expected in zip(
        out.gradients, ([low / 9] * 3, [low / 3], [-high / 9] * 3), strict=True
    ):
        np.testing.assert_allclose(gradient[1:], expected, rtol=1e-4)


def test_visurf_outlier_advantage():
    """Section 9(f)2: eight failures and one y: 8/sqrt(9)."""
    g = with_demo((0, 0))
    g = replace(g, trajectories=g.trajectories[:1] * 8, rewards=np.zeros(8, np.float32))
    assert make_method("visurf", {}).rows(batch(groups=[g]))[-1].streams["advantage"][
        -1
    ] == pytest.approx(8 / 3, rel=1e-4)


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (1.0, 1.0), (0.7, 1.1)])
def test_visurf_smoothing_takes_y_out(rewards):
    """Section 9(g): where a rollout reaches R(y), A_y is exactly 0 and the gradient is GRPO's with
    mean and std over G + 1 rows.
    """
    method = make_method("visurf", {})
    g = with_demo(rewards)
    out = look(method, batch(groups=[g]))
    assert (
        not out.rows[-1].streams["advantage"].any()
        and out.denominators["policy"] == 3.0
        and method.metrics(0) == {"smoothed": 1.0}
    )
    r = np.append(
        np.array(rewards, np.float32).astype(np.float64),
        np.array(rewards, np.float32).mean(dtype=np.float64),
    )
    expected = (r - r.mean()) / (r.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(
        [row.streams["advantage"][-1] for row in out.rows[:2]], expected[:2], rtol=1e-5, atol=1e-7
    )
    plain = make_method("visurf", {"smoothing": False}).rows(batch(groups=[g]))
    assert (plain[-1].streams["advantage"][-1] != 0) == (rewards != (1.0, 1.0))


def test_visurf_smoothing_allows_for_rounding():
    """Section 9(f)4: 0.99 counts as 1 within a tolerance of 0.02, not by default, where 1 - 1e-7
    does.
    """

    def fires(best, **options):
        return make_method("visurf", options).matched(with_demo((best, 0)))

    assert fires(0.99, tolerance=0.02) and not fires(0.99) and fires(1 - 1e-7)


def test_visurf_rewards_are_controlled_by_hand(tmp_path):
    """Controls 1 and 2: y rewritten, R(y) given; no reward function need speak of y then."""
    (tmp_path / "mine.py").write_text(
        "def align(y, rollouts):\n    return [*y[:-1], len(rollouts), y[-1]]\n"
    )
    method = make_method("visurf", {"reward": 0.5, "align": f"{tmp_path}/mine.py:align"})
    *_, y = method.rows(batch(groups=[with_demo((0, 0), demo_reward=None)]))
    assert y.tokens.tolist() == [1, 5, 6, 2, 3] and y.streams["advantage"].tolist()[
        1:
    ] == pytest.approx([2 / math.sqrt(3)] * 4, rel=1e-4)
    assert len(method.rows(batch(groups=[rollouts((0, 0))]))) == 2, "no demonstration, no y"


def test_visurf_first_update_is_rlvr_plus_weighted_sft():
    """Section 9(g): rho_y = 1 on the first update, whatever p is; the y row's gradient is A_y times
    that of SFT, with Z of the group.
    """
    g = with_demo((0, 0))
    y = by_source(
        look(make_method("visurf", {"policy": {"reduction": "token_mean"}}), batch(groups=[g])),
        Source.EXPERT,
    )[0]
    sft = inspect(
        make_method("sft", {}), batch(groups=(), experts=(as_expert(g),)), ramp
    ).gradients[0]
    np.testing.assert_allclose(y * 7, 2 / math.sqrt(3) * sft * 3, rtol=1e-4)


# -- SRFT, section 2


def test_srft_by_hand():
    """H = 0.2 everywhere, p = 1/2.

    Self: +0.1 e^H on three tokens, -1 on one, of four. Rewards 1, 0, 1: A = (1/3)/(1/sqrt(3)) =
    1/sqrt(3).
    """
    out = look(
        make_method("srft", {}), batch(groups=[with_demo((1, 0))]), half, entropy=constant(0.2)
    )
    up, sft, a = 0.1 * math.exp(0.2), 0.5 * math.exp(-0.2), 1 / math.sqrt(3)
    assert out.terms["self"] == pytest.approx((3 * up - 1) * math.log(2) / 4, rel=1e-5)
    assert out.terms["demo_sft"] == pytest.approx(sft * math.log(2), rel=1e-5) and out.terms[
        "demo_rl"
    ] == pytest.approx(-a * 0.5, rel=1e-4)
    for gradient, expected in zip(
        out.gradients, ([-up / 4] * 3, [1 / 4], [(-sft - a * 0.5) / 3] * 3), strict=True
    ):
        np.testing.assert_allclose(gradient[1:], expected, rtol=1e-4)


def test_srft_as_code_by_hand():
    """Entropy of the token itself, exp(+H), the shaped ratio, an entropy bonus over all tokens.

    Rewards 1, 0, 1: A = 1/sqrt(3).
    """

    def entropies(row):
        return 0.1 * np.arange(len(row.tokens), dtype=np.float32)

    out = look(
        make_method("srft", {"as": "code"}),
        batch(groups=[with_demo((1, 0))]),
        half,
        entropy=entropies,
    )
    up, shaped = np.exp([0.1, 0.2, 0.3]), 0.1 * 0.5 / 0.36 / math.sqrt(3)
    for gradient, expected in zip(
        out.gradients, (-0.1 * up / 4, [1 / 4], (-0.5 * up - shaped) / 3), strict=True
    ):
        np.testing.assert_allclose(gradient[1:], expected, rtol=1e-4)
    assert out.coefficients["entropy"] == 0.001 and out.denominators["entropy"] == 7.0


def test_srft_weights_at_zero_entropy_and_no_gradient_through_them():
    """Section 2(g): H = 0 gives 0.5 and 0.1."""
    entropy = torch.zeros(3, requires_grad=True)
    index, source = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int8)
    logp = torch.full((3,), -1.0, requires_grad=True)
    for objective, expected in ((EntropyWeightedNLL(), 0.5), (SelfReinforce(), 0.1)):
        loss, metrics = objective(
            Tokens(logp, index, index, source, {"advantage": torch.ones(3), "entropy": entropy})
        )
        assert torch.allclose(
            metrics["weight"], torch.tensor(expected)
        ) and loss.tolist() == pytest.approx([expected] * 3)
        assert torch.autograd.grad(loss.sum(), entropy, allow_unused=True) == (None,)


def test_srft_pushes_down_all_wrong_rollouts_and_up_the_demonstration():
    """Section 2(g): + grad log pi over the rollouts' tokens; both demonstration terms negative in
    log p.
    """
    out = look(make_method("srft", {}), batch(groups=[with_demo((0, 0))]), half)
    for gradient in by_source(out, Source.POLICY):
        np.testing.assert_allclose(gradient[1:], 0.25)
    assert (by_source(out, Source.EXPERT)[0][1:] < 0).all()


def test_srft_reads_any_reward_above_zero_as_right():
    """Section 2(c): rewards {+1, -1} or {1, 0}, and parts of 1."""

    def signs(rewards):
        return [
            row.streams["advantage"][-1]
            for row in make_method("srft", {}).rows(batch(groups=[rollouts(rewards)]))
        ]

    assert signs((0.1, 0.0)) == signs((1.0, -1.0)) == [1.0, -1.0]


def test_srft_without_a_demonstration_is_its_self_term_alone():
    """Section 2(g): independent of the group's statistics."""
    alone, beside = (
        look(make_method("srft", {}), batch(groups=g))
        for g in ([rollouts((1, 0))], [rollouts((1, 0)), rollouts((1, 1), number=1)])
    )
    with_it = look(make_method("srft", {}), batch(groups=[with_demo((1, 0))]))
    assert alone.terms["demo_sft"] == alone.terms["demo_rl"] == 0.0
    np.testing.assert_array_equal(alone.gradients[0], with_it.gradients[0])
    np.testing.assert_allclose(alone.gradients[0], 2 * beside.gradients[0], rtol=1e-6)


def test_a_demonstration_alone_is_plain_sft_for_srft_at_zero_entropy():
    g = without_rollouts(DEMO, 1.0)
    out = look(make_method("srft", {"sft_scale": 1.0}), batch(groups=[g]), entropy=constant(0.0))
    np.testing.assert_array_equal(
        out.gradients[0],
        inspect(make_method("sft", {}), batch(groups=(), experts=(as_expert(g),)), ramp).gradients[
            0
        ],
    )


def test_truncated_rollouts_do_not_drag_the_demonstration_along():
    method = make_method("luffy", {"policy": {"advantage": "dr_grpo", "mask_truncated": True}})
    out = look(method, batch(groups=[with_demo((0, 0), finish=Finish.LENGTH)]))
    assert (
        not any(g.any() for g in by_source(out, Source.POLICY))
        and by_source(out, Source.EXPERT)[0].any()
    )
