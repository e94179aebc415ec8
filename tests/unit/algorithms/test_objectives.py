"""Token objectives over a grid of ratios and advantages, on both sides of every bound, and the
options of the RL half under any packing.

Sections are those of the methods dossier: 0.1, 0.4, 14.1, 14.2, 14.7, 16.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import aligned, batch, by_source, ids, look, rollouts

from tandem.algorithms.parts.advantages import ESTIMATORS
from tandem.algorithms.parts.objectives.entropy import KLToReference
from tandem.algorithms.parts.objectives.policy import CISPO, GSPO, PPOClip
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.policy import PolicyLoss
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Source
from tandem.engine.learner.inspect import inspect

RATIOS, ADVANTAGES = [0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.27, 1.29, 2.9, 3.1], [-1.5, 0.7]


def tokens(logp, advantage=None, segment=None, **streams) -> Tokens:
    def tensor(x):
        return None if x is None else torch.tensor(np.asarray(x, np.float32))

    if advantage is not None:
        streams["advantage"] = advantage
    logp = tensor(logp).requires_grad_()
    zeros = torch.zeros(len(logp), dtype=torch.int64)
    return Tokens(
        logp,
        zeros if segment is None else torch.tensor(segment),
        zeros,
        zeros.to(torch.int8),
        {name: tensor(stream) for name, stream in streams.items()},
    )


def weights(objective, t: Tokens) -> np.ndarray:
    """What each token weighs on grad log pi."""
    loss, _ = objective(t)
    loss.sum().backward()
    return -t.logp.grad.numpy()


def grid():
    """(tokens, ratios, advantages): every ratio with every advantage."""
    rho, a = (x.ravel() for x in np.meshgrid(RATIOS, ADVANTAGES))
    return (
        tokens(np.log(rho) - 2.0, a, segment=np.arange(len(rho)), old_logp=np.full(len(rho), -2.0)),
        rho,
        a,
    )


@pytest.mark.parametrize(
    "low, high, dual", [(0.2, 0.2, None), (0.2, 0.28, None), (0.2, 0.2, 3.0), (0.4, 0.2, None)]
)
def test_a_ppo_token_weighs_ratio_times_advantage_where_it_is_kept(low, high, dual):
    """Section 0.1: w = rho A keep; keep = not (A > 0 and rho > 1 + eps_h), not (A < 0 and rho < 1 -
    eps_l), with dual clip not (A < 0 and rho > c).
    """
    t, rho, a = grid()
    keep = (
        ~((a > 0) & (rho > 1 + high))
        & ~((a < 0) & (rho < 1 - low))
        & ~((a < 0) & (rho > (dual or math.inf)))
    )
    np.testing.assert_allclose(weights(PPOClip(low, high, dual), t), rho * a * keep, rtol=1e-4)


def test_a_cispo_token_keeps_the_bounded_ratio_on_both_sides():
    """Section 14.2: verl's form. With clip_low 1 it is TRL's, bounded above only."""
    for low in (0.2, 1.0):
        t, rho, a = grid()
        np.testing.assert_allclose(
            weights(CISPO(low, 0.2), t), np.clip(rho, 1 - low, 1.2) * a, rtol=1e-4
        )


def test_gspo_clips_by_the_sequences_ratio_within_its_own_small_bounds():
    """Section 14.2: s = exp(mean log-ratio), here of two tokens 0.3 above and below; 3e-4 below 1
    and 4e-4 above.
    """
    s, a = (x.ravel() for x in np.meshgrid([0.9996, 0.9998, 1.00035, 1.0005], ADVANTAGES))
    t = tokens(
        -2.0 + np.repeat(np.log(s), 2) + np.tile([0.3, -0.3], len(s)),
        np.repeat(a, 2),
        np.repeat(np.arange(len(s)), 2),
        old_logp=np.full(2 * len(s), -2.0),
    )
    keep = ~((a > 0) & (s > 1.0004)) & ~((a < 0) & (s < 0.9997))
    objective = PolicyLoss.parse("gspo").token_objective()
    np.testing.assert_allclose(weights(objective, t), np.repeat(s * a * keep, 2), rtol=1e-4)
    assert objective == GSPO()


def test_gspo_of_single_tokens_is_ppo():
    """Section 14.7."""
    np.testing.assert_allclose(
        weights(GSPO(0.2, 0.28), grid()[0]), weights(PPOClip(0.2, 0.28), grid()[0]), rtol=1e-5
    )


def test_far_out_numbers_are_clamped_before_they_are_exponentiated():
    """Section 14.2: log-ratios to +-20, the KL's difference to +-10."""
    t = tokens([-1.0, -1.0], [1.0, 1.0], old_logp=[-20.0, -30.0])
    loss, _ = PPOClip(math.inf, math.inf)(t)
    np.testing.assert_allclose(-loss.detach(), np.exp([19.0, 20.0]), rtol=1e-4)
    t = tokens([-20.0, -20.0, -1.0], ref_logp=[-11.0, -5.0, -20.0])
    loss, _ = KLToReference()(t)
    np.testing.assert_allclose(
        loss.detach(), [math.exp(9) - 10, math.exp(10) - 11, math.exp(-10) + 9], rtol=1e-4
    )


def test_a_token_without_a_snapshot_has_ratio_one():
    """Section 0.4: beside tokens that have one."""
    t = tokens([-1.0, -1.0], [0.5, 0.5], old_logp=[math.nan, -1.1])
    np.testing.assert_allclose(weights(PPOClip(), t), [0.5, 0.5 * math.exp(0.1)], rtol=1e-5)


def test_a_group_of_equal_rewards_has_no_advantage_at_all():
    """Section 14.7: where rounding in the mean of 0.1, 0.1, 0.1 would leave a rest."""
    equal = np.full(3, 0.1)
    assert (equal - equal.mean()).any(), "else this tests nothing"
    for name in ("grpo", "dr_grpo", "rloo"):
        assert not ESTIMATORS[name]([equal], [np.ones(3)])[0].any(), name


def test_reinforce_pp_baseline_compares_within_the_group():
    """Section 14.1: groups 1, 0 (one token each) and 3, 3 (two each): 1/2, -1/2 and four zeros over
    tokens, unbiased variance (1/4 + 1/4)/5.
    """
    a, b = ESTIMATORS["reinforce_pp_baseline"](
        [np.array([1.0, 0.0]), np.array([3.0, 3.0])], [np.array([1, 1]), np.array([2, 2])]
    )
    np.testing.assert_allclose(
        np.concatenate([a, b]),
        [0.5 / math.sqrt(0.1), -0.5 / math.sqrt(0.1), 0, 0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "floor, expected", [(None, [0.0, 0.0, 3.0, 0.25]), (0.5, [0.0, 0.0, 3.0, 0.0])]
)
def test_the_band_of_a_masking_correction(floor, expected):
    """Section 14.4: w = 6, 0.1, 3, 0.25 and cap 5.

    IcePop's band is [0.5, 5]; without a floor of its own it is [1/5, 5].
    """
    correction = (
        PolicyLoss(
            correction="token", correction_mode="mask", correction_cap=5.0, correction_floor=floor
        )
        .terms(batch())[0]
        .correction
    )
    w = np.array([6.0, 0.1, 3.0, 0.25])
    found = correction(tokens(np.full(4, -2.0), behaviour_logp=-2.0 - np.log(w)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


OPTIONS = [
    {"preset": "gspo"},
    {"preset": "cispo"},
    {"preset": "rloo"},
    {"preset": "dr_grpo", "reduction_length": 8},
    {"preset": "reinforce_pp"},
    {"preset": "reinforce_pp_baseline"},
    {"dual_clip": 3.0, "kl": 0.1, "entropy_bonus": 0.01},
    {"correction": "token"},
    {"correction": "token", "correction_mode": "mask"},
    {"correction": "sequence", "correction_cap": 5.0},
    {"correction": "sequence", "correction_mode": "mask", "correction_cap": 5.0},
    {"mask_truncated": True},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(map(str, options.values()))
)
def test_order_and_packing_change_nothing_whatever_the_rl_half(options):
    """Section 0.6, I-0b, off policy: GSPO's and the correction's sequences must not mix where rows
    share a micro-batch.
    """

    def own(t, n):
        return replace(t, tokens=t.tokens + 20 * n * (t.source == Source.POLICY))

    groups = [aligned([0, 1, 0, 2], None, number=n) for n in range(3)]
    groups = [
        replace(g, trajectories=tuple(own(t, n) for t in g.trajectories))
        for n, g in enumerate(groups)
    ]
    turned = [
        replace(g, trajectories=g.trajectories[::-1], rewards=g.rewards[::-1]) for g in groups[::-1]
    ]

    def old(row):
        return ids(row) + 0.3 * np.sin(row.tokens)

    whole = look(make_method("grpo", {"policy": options}), batch(groups=groups), ids, old=old)
    split = look(
        make_method("grpo", {"policy": options}),
        batch(groups=turned),
        ids,
        old=old,
        micro_batch_tokens=12,
        ranks=2,
    )
    assert split.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-6) and any(
        g.any() for g in whole.gradients
    )
    theirs = {
        (row.group, *row.tokens): g for row, g in zip(split.rows, split.gradients, strict=True)
    }
    for row, g in zip(whole.rows, whole.gradients, strict=True):
        np.testing.assert_allclose(theirs[(row.group, *row.tokens)], g, rtol=1e-4, atol=1e-7)


def test_another_weight_on_expert_tokens_changes_their_gradients_alone():
    """Section 16.4: one, p and phi."""
    outs = [
        inspect(make_method("chord_mu", {"mu": 0.3, "token_weight": w}), batch(), ids)
        for w in ("one", "p", "phi")
    ]
    for out in outs[1:]:
        assert all(
            np.array_equal(a, b)
            for a, b in zip(
                by_source(out, Source.POLICY), by_source(outs[0], Source.POLICY), strict=True
            )
        )
        assert not any(
            np.allclose(a, b)
            for a, b in zip(
                by_source(out, Source.EXPERT), by_source(outs[0], Source.EXPERT), strict=True
            )
        )


def test_the_rl_halfs_regularisers_are_weighted_with_it():
    """Section 1(a) over a parent with KL and entropy: all of L_GRPO weighs 1 - mu."""
    out = look(
        make_method("chord_mu", {"mu": 0.25, "policy": {"kl": 0.1, "entropy_bonus": 0.01}}),
        batch(groups=[rollouts()]),
    )
    assert out.coefficients == pytest.approx(
        {"policy": 0.75, "kl": 0.075, "entropy": 0.0075, "expert": 0.25}
    )
