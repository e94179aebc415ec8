"""PPO with a critic and ReFT, on numbers worked out by hand.

Sections are those of the methods dossier: 10(g), 14.1, 14.2, 14.7.
"""

from dataclasses import replace

import numpy as np
import pytest

from tandem.algorithms.base import Batch, Budget
from tandem.algorithms.parts.critic import Critic, gae
from tandem.algorithms.parts.diagnostics import critic_diagnostics
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Finish
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect

LOGP = -0.5


def flat(number):
    return lambda row: np.full(len(row.tokens), number, np.float32)


def at(*values):
    """Values at the tokens of a row with one prompt token; the prompt's own is poison, since no
    state comes before it.
    """
    return lambda row: np.array([np.nan, *values][: len(row.tokens)], np.float32)


def ppo(**critic):
    return make_method("ppo", {"policy": {"critic": {"whiten": False, "clip": None, **critic}}})


def one(reward=1.0, tokens=(5, 6, 7), finish=Finish.STOP):
    return Batch(0, (group([trajectory([1], tokens, finish=finish)], [reward]),), ())


def test_lambda_one_gives_the_sum_of_rewards_still_to_come_minus_the_value():
    """Section 10(g)."""
    rewards, values = np.array([0.1, -0.2, 1.0]), np.array([0.5, 0.4, 0.3])
    advantages, returns = gae(rewards, values, 0.0, 1.0, 1.0)
    np.testing.assert_allclose(advantages, [0.9 - 0.5, 0.8 - 0.4, 1.0 - 0.3])
    np.testing.assert_allclose(returns, [0.9, 0.8, 1.0])
    # discounted, with the value of the state it was cut in
    advantages, _ = gae(rewards, values, 2.0, 0.5, 1.0)
    np.testing.assert_allclose(
        advantages, [0.1 - 0.1 + 0.25 + 0.25 - 0.5, -0.2 + 0.5 + 0.5 - 0.4, 1.0 + 1.0 - 0.3]
    )


def test_lambda_zero_gives_the_td_error():
    advantages, returns = gae(np.array([0.1, -0.2, 1.0]), np.array([0.5, 0.4, 0.3]), 0.0, 0.9, 0.0)
    np.testing.assert_allclose(advantages, [0.1 + 0.36 - 0.5, -0.2 + 0.27 - 0.4, 1.0 - 0.3])
    np.testing.assert_allclose(returns, [0.1 + 0.36, -0.2 + 0.27, 1.0])


def test_gae_by_hand_in_a_row():
    """gamma 1, lam 1/2, reward 1 at the end, V = 0.2 0.6 0.4: delta = 0.4 -0.2 0.6; A = 0.4 + (-0.2
    + 0.3)/2, -0.2 + 0.3, 0.6.
    """
    out = inspect(ppo(lam=0.5), one(), flat(LOGP), value=at(0.2, 0.6, 0.4))
    np.testing.assert_allclose(out.rows[0].streams["advantage"], [0, 0.45, 0.1, 0.6], rtol=1e-6)
    np.testing.assert_allclose(out.rows[0].streams["returns"], [0, 0.65, 0.7, 1.0], rtol=1e-6)
    np.testing.assert_allclose(out.gradients[0], [0, -0.15, -0.1 / 3, -0.2], rtol=1e-5)
    errors = np.array([0.45, 0.1, 0.6])  # value - return, the other way round
    assert out.terms["value"] == pytest.approx(0.5 * (errors**2).mean(), rel=1e-5)
    np.testing.assert_allclose(out.value_gradients[0], [0, *(-errors / 3)], rtol=1e-5)


def test_tool_tokens_are_no_steps():
    """Section 14.1: the state is carried over a tool's output, whatever the critic says there."""
    plain = one()
    t = plain.groups[0].trajectories[0]
    tool = replace(
        t,
        tokens=np.array([1, 5, 6, 90, 91, 7], np.int32),
        source=np.array([0, 1, 1, 5, 5, 1], np.int8),
        behaviour_logp=None,
        version=None,
    )
    with_tool = replace(plain, groups=(replace(plain.groups[0], trajectories=(tool,)),))
    expected = inspect(ppo(lam=0.5), plain, flat(LOGP), value=at(0.2, 0.6, 0.4))
    out = inspect(ppo(lam=0.5), with_tool, flat(LOGP), value=at(0.2, 0.6, 100.0, 100.0, 0.4))
    for found, right in (
        (out.rows[0].streams["advantage"], expected.rows[0].streams["advantage"]),
        (out.gradients[0], expected.gradients[0]),
        (out.value_gradients[0], expected.value_gradients[0]),
    ):
        np.testing.assert_allclose(found[[0, 1, 2, 5]], right, rtol=1e-6)
        assert not found[3:5].any()


def test_without_kl_and_value_it_is_reinforce_with_the_reward():
    """Section 10(g): beta 0 and V = 0."""
    g = group([trajectory([1], [5, 6]), trajectory([1], [7, 8, 9])], [1.0, -0.5])
    ours = inspect(ppo(), Batch(0, (g,), ()), flat(LOGP), value=flat(0.0))
    plain = inspect(
        make_method("grpo", {"policy": {"advantage": "raw", "objective": "reinforce"}}),
        Batch(0, (g,), ()),
        flat(LOGP),
    )
    for a, b in zip(ours.gradients, plain.gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert ours.gradients[1].any()


def test_advantages_are_white_over_the_tokens_of_the_batch_and_returns_are_not():
    """Section 10(g): mean 0, std 1 over the mask; 14.1: returns come first."""
    g = group([trajectory([1], [5, 6]), trajectory([1], [7, 8, 9])], [1.0, -0.5])
    method = make_method("ppo", {"policy": {"critic": {"lam": 0.9}}})
    out = inspect(
        method,
        Batch(0, (g,), (trajectory([1], [4], expert=True),)),
        flat(LOGP),
        value=at(0.2, 0.6, 0.4),
    )
    raw = inspect(ppo(lam=0.9), Batch(0, (g,), ()), flat(LOGP), value=at(0.2, 0.6, 0.4))
    a, b = (np.concatenate([r.streams["advantage"][1:] for r in o.rows]) for o in (out, raw))
    assert (
        len(a) == 5
        and a.mean() == pytest.approx(0, abs=1e-6)
        and a.std(ddof=1) == pytest.approx(1, rel=1e-5)
    )
    np.testing.assert_allclose(a, (b - b.mean()) / b.std(ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(out.rows[0].streams["returns"], raw.rows[0].streams["returns"])
    parts = inspect(
        method,
        Batch(0, (g,), ()),
        flat(LOGP),
        value=at(0.2, 0.6, 0.4),
        micro_batch_tokens=4,
        ranks=2,
    )
    assert parts.loss == pytest.approx(out.loss, rel=1e-6), (
        "whitening looks at the batch, not at a micro-batch or rank"
    )


def test_value_clip_by_hand():
    """Return 1, V_old 0, clip 0.2.

    V 0.1: both (0.9)^2. V 0.5: clipped to 0.2, 0.8^2 > 0.5^2, no gradient. V -0.5: 1.5^2 > 1.2^2,
    gradient. Section 14.2.
    """
    out = inspect(ppo(clip=0.2), one(), flat(LOGP), value=at(0.1, 0.5, -0.5), old_value=flat(0.0))
    np.testing.assert_allclose(out.rows[0].streams["returns"][1:], 1.0)
    assert out.terms["value"] == pytest.approx(0.5 * (0.81 + 0.64 + 2.25) / 3, rel=1e-5)
    np.testing.assert_allclose(out.value_gradients[0], [0, -0.9 / 3, 0, -1.5 / 3], rtol=1e-5)
    assert out.metrics["value/clip_fraction"] == pytest.approx(2 / 3)


def test_kl_in_the_reward_by_hand():
    """beta 0.1, log pi_old - log pi_ref = 0.5, -1, 2: rewards -0.05, 0.1, -0.2 + 1; it is the old
    policy's KL, not the present one's. Section 10(f).
    """
    method, old, now = ppo(kl=0.1), at(-0.5, -1.0, -2.0), at(-0.4, -1.1, -2.0)
    out = inspect(method, one(), now, old=old, reference=at(-1.0, 0.0, -4.0), value=flat(0.0))
    np.testing.assert_allclose(out.rows[0].streams["advantage"][1:], [0.85, 0.9, 0.8], rtol=1e-5)
    found = critic_diagnostics(out.rows)
    assert (
        found["critic/kl"] == pytest.approx(1.5)
        and found["critic/return"] == pytest.approx(0.85)
        and found["critic/explained_variance"] == pytest.approx(0, abs=1e-6)
    )
    with pytest.raises(ValueError, match="needs 'ref_logp', which inspect was not given"):
        inspect(method, one(), now)


@pytest.mark.parametrize(
    "finish, bootstrap, last",
    [(Finish.LENGTH, True, 0.7), (Finish.LENGTH, False, 0.0), (Finish.STOP, True, 0.0)],
)
def test_a_cut_response_ends_in_the_value_of_its_last_state_if_asked(finish, bootstrap, last):
    """gamma 1/2, lam 0: the last token's advantage is R + V_end/2 - V_T.

    The token that asks for V_end is gone again before training.
    """
    out = inspect(
        ppo(gamma=0.5, lam=0.0, bootstrap=bootstrap),
        one(finish=finish),
        flat(LOGP),
        value=at(0.2, 0.6, 0.4, 0.7),
    )
    np.testing.assert_allclose(
        out.rows[0].streams["advantage"], [0, 0.3 - 0.2, 0.2 - 0.6, 1.0 + last / 2 - 0.4], rtol=1e-5
    )
    assert out.rows[0].tokens.tolist() == [1, 5, 6, 7] and out.denominators == {
        "policy": 3.0,
        "value": 3.0,
    }


def test_on_policy_reft_has_the_gradient_of_the_sequence_mean():
    """Section 10(g): rho = 1 gives -SEQ{A grad log pi}; the value term is five times its sequence
    mean.
    """
    g = group([trajectory([1], [5, 6]), trajectory([1], [7, 8, 9])], [1.0, 0.1])
    method = make_method("reft", {"sft_steps": 0})
    assert (
        method.policy.critic.lam,
        method.policy.critic.kl(0),
        method.policy.critic.coefficient,
        method.policy.clip_low,
    ) == (0.95, 0.01, 5.0, 0.2)
    out = inspect(
        method, Batch(0, (g,), ()), flat(LOGP), reference=flat(LOGP - 0.1), value=at(0.2, 0.6, 0.4)
    )
    for row, gradient, value_gradient in zip(
        out.rows, out.gradients, out.value_gradients, strict=True
    ):
        n = len(row.tokens) - 1
        np.testing.assert_allclose(
            gradient, -row.streams["advantage"] / n / 2, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(
            value_gradient[1:],
            5 * (np.array([0.2, 0.6, 0.4][:n]) - row.streams["returns"][1:]) / n / 2,
            rtol=1e-4,
            atol=1e-7,
        )


def test_reft_keeps_its_critic_where_one_option_is_changed():
    critic = make_method("reft", {"policy": {"critic": {"kl": 0.05}}}).policy.critic
    assert (critic.kl(0), critic.lam, critic.coefficient) == (0.05, 0.95, 5.0)


def test_reft_warms_up_and_then_freezes_the_reference():
    method, budget = (
        make_method("reft", {"sft_steps": 2, "sft_learning_rate": 1e-5}),
        Budget(4, 1, 16, 10),
    )
    demands = [method.demand(step, budget, {}) for step in range(4)]
    assert [d.set_reference for d in demands] == [False, False, True, False]
    assert [(d.prompts, d.experts) for d in demands] == [(0, 16), (0, 16), (4, 0), (4, 0)]
    experts = (trajectory([1, 2], [5, 6, 3], expert=True),)
    warm = inspect(method, Batch(0, (), experts), flat(LOGP))
    assert warm.loss == inspect(
        make_method("sft", {}), Batch(0, (), experts), flat(LOGP)
    ).loss and set(warm.terms) == {"sft"}
    assert not make_method("sft_rl", {"sft_steps": 2}).demand(2, budget, {}).set_reference, (
        "no KL, no reference"
    )


def test_a_hybrid_takes_a_critic_like_any_other_option():
    """CHORD over PPO: the expert half is untouched, the RL half and its critic weigh 1 - mu."""
    g, experts = (
        group([trajectory([1], [5, 6]), trajectory([1], [7, 8, 9])], [1.0, 0.0]),
        (trajectory([1], [5, 6, 3], expert=True),),
    )
    method = make_method(
        "chord_mu", {"mu": 0.25, "policy": {"preset": "ppo", "critic": {"lam": 0.9}}}
    )
    assert method.critic
    out = inspect(method, Batch(0, (g,), experts), flat(LOGP), value=at(0.2, 0.6, 0.4))
    rl = inspect(
        make_method("ppo", {"policy": {"critic": {"lam": 0.9}}}),
        Batch(0, (g,), ()),
        flat(LOGP),
        value=at(0.2, 0.6, 0.4),
    )
    sft = inspect(make_method("sft", {}), Batch(0, (), experts), flat(LOGP))
    assert out.loss == pytest.approx(0.75 * rl.loss + 0.25 * sft.loss, rel=1e-6)
    assert "returns" not in out.rows[2].streams and not out.value_gradients[2].any()


def test_options_that_contradict_are_refused():
    with pytest.raises(ValueError, match=r"policy.advantage is 'grpo', which has no critic"):
        make_method("grpo", {"policy": {"critic": {"lam": 0.9}}})
    with pytest.raises(ValueError, match="did you mean 'lam'"):
        make_method("ppo", {"policy": {"critic": {"lamb": 0.9}}})
    with pytest.raises(ValueError, match=r"policy.critic.lam is 1.5"):
        Critic(lam=1.5)
    assert (
        not make_method("grpo", {}).critic
        and not make_method("sft", {}).critic
        and make_method("reft", {}).critic
    )
