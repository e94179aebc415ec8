"""Methods that make rollouts start from the demonstration: Prefix-RFT and UFT. Sections 3 and 6 of
the methods dossier.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from method_cases import (
    BUDGET,
    aligned,
    batch,
    by_source,
    commit,
    constant,
    forced,
    half,
    look,
    ramp,
    rollouts,
)

from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Prompt, Sampling, Source
from tandem.engine.learner.inspect import inspect


def prompt(tokens=20):
    return Prompt(
        "p", np.array([1], np.int32), "", {}, np.arange(100, 100 + tokens, dtype=np.int32)
    )


def requests(method, step, tokens=20, groups=range(200), budget=BUDGET, max_tokens=64):
    return [method.request(g, prompt(tokens), Sampling(max_tokens), step, budget) for g in groups]


def hybrid(rewards=(0.0, 1.0)):
    """A plain rollout of three tokens, and a hybrid: prefix 9 8 4 2 6 of the demonstration, then 5
    5.
    """
    g = rollouts(rewards, demo=[9, 8, 4, 2, 6, 3])
    return replace(
        g, trajectories=(g.trajectories[0], forced(g.trajectories[1], [9, 8, 4, 2, 6], [5, 5]))
    )


# -- Prefix-RFT, section 3


def test_prefix_rft_by_hand():
    """A = -0.7071 and 0.7071; Z = 3 + 7.

    Of five prefix tokens the ceil(0.2 5) = 1 with the highest entropy is pushed, the other four
    count.
    """

    def entropy(row):
        return np.array([0, 0.1, 0.9, 0.3, 0.2, 0.1, 5, 5], np.float32)[: len(row.tokens)]

    out = look(make_method("prefix_rft", {}), batch(groups=[hybrid()]), entropy=entropy)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(out.gradients[0][1:], [a / 10] * 3, rtol=1e-5)
    np.testing.assert_allclose(
        out.gradients[1][1:], np.array([0, 1, 0, 0, 0, 1, 1]) * -a / 10, rtol=1e-5
    )
    assert out.denominators == {"policy": 10.0}


def test_a_wrong_continuation_pushes_the_prefix_down():
    """Section 3(a): one trajectory, one advantage, negative on expert tokens as well."""
    out = look(make_method("prefix_rft", {"keep": 1.0}), batch(groups=[hybrid((1.0, 0.0))]))
    assert (out.gradients[1][1:] > 0).all()


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.2, 0.21, 0.5, 1.0])
def test_exactly_the_kept_share_of_prefix_tokens_is_pushed(keep):
    """Section 3(g): ceil(keep * prefix) positions, equal entropies included; continuations do not
    depend on it.
    """
    out = look(
        make_method("prefix_rft", {"keep": keep}), batch(groups=[hybrid()]), entropy=constant(0.5)
    )
    assert np.count_nonzero(out.gradients[1][1:6]) == math.ceil(5 * keep)
    full = look(make_method("prefix_rft", {"keep": 1.0}), batch(groups=[hybrid()]))
    np.testing.assert_array_equal(out.gradients[1][6:], full.gradients[1][6:])
    np.testing.assert_array_equal(out.gradients[0], full.gradients[0])


def test_a_fully_kept_hybrid_is_an_ordinary_rollout():
    """Section 3(g); and at rho = 1 the advantages of a group sum to 0."""
    g = hybrid()

    def sampled(t):
        return replace(
            t, source=np.where(t.source == Source.PREFIX, Source.POLICY, t.source).astype(np.int8)
        )

    out = look(make_method("prefix_rft", {"keep": 1.0}), batch(groups=[g]))
    plain = inspect(
        make_method("grpo", {}),
        batch(groups=[replace(g, trajectories=tuple(map(sampled, g.trajectories)))]),
        ramp,
    )
    for a, b in zip(out.gradients, plain.gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    assert sum(row.streams["advantage"][-1] for row in out.rows) == pytest.approx(0, abs=1e-6)


def test_the_prefix_stays_out_of_regularisers_and_correction():
    """Section 3(f)1; nor does a shared array carry the prefix into another term."""
    method = make_method(
        "prefix_rft",
        {"keep": 1.0, "policy": {"kl": 0.1, "entropy_bonus": 0.01, "correction": "token"}},
    )
    out = look(method, batch(groups=[hybrid()]), constant(-3.0))
    assert out.denominators == {"policy": 10.0, "kl": 5.0, "entropy": 5.0}
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(out.gradients[1][1:6], -a / 10, rtol=1e-5)
    rows = make_method("prefix_rft", {"keep": 1.0, "policy": {"correction": "token"}})
    corrected = look(rows, batch(groups=[hybrid()]), constant(-3.0)).gradients[1]
    np.testing.assert_allclose(corrected[6:], -a * math.exp(-2) / 10, rtol=1e-5)


def test_prefix_lengths_follow_their_schedule():
    """Section 3(b): l ~ U(low, 0.95), low from 0.95 to 0; cut on token ids, one hybrid per group,
    never the whole response.
    """
    method = make_method(
        "prefix_rft", {"low": {"kind": "cosine", "peak": 0.95, "valley": 0.0, "decay": 100}}
    )
    early, late = requests(method, 0), requests(method, 100)
    assert {len(r.prefixes[-1]) for r in early} == {19}, "floor(0.95 20)"
    lengths = [len(r.prefixes[-1]) if r.prefixes else 0 for r in late]
    assert (
        np.mean(lengths) == pytest.approx(20 * 0.95 / 2 - 0.5, abs=1.0)
        and min(lengths) == 0
        and max(lengths) == 18
    )
    some = late[3]
    assert (
        [len(p) for p in some.prefixes[:-1]] == [0] * (BUDGET.samples - 1)
        and some.samples == BUDGET.samples
        and some.prefix_source == Source.PREFIX
    )
    np.testing.assert_array_equal(
        some.prefixes[-1], prompt().demonstration[: len(some.prefixes[-1])]
    )
    always = make_method("prefix_rft", {"low": 1.0, "high": 1.0})
    assert {len(r.prefixes[-1]) for r in requests(always, 0)} == {19} and not requests(
        always, 0, tokens=1
    )[0].prefixes


def test_prefixes_are_drawn_from_seed_and_group():
    method = make_method("prefix_rft", {"low": 0.0})

    def lengths(budget):
        return [
            len(r.prefixes[-1]) if r.prefixes else 0 for r in requests(method, 5, budget=budget)
        ]

    assert lengths(BUDGET) == lengths(BUDGET) != lengths(replace(BUDGET, seed=8))


def test_the_lower_bound_of_a_prefix_is_never_above_the_upper():
    """Section 3(b): low 0.95 early on, high set to 0.5: half of 20 tokens."""
    assert {len(r.prefixes[-1]) for r in requests(make_method("prefix_rft", {"high": 0.5}), 0)} == {
        10
    }


def test_the_kl_in_the_reward_is_that_of_tokens_the_policy_sampled():
    """Section 3(f)1, with a critic: log pi_old - log pi_ref = 0.5 everywhere, beta 0.1; the prefix
    pays nothing, the two sampled tokens 0.05 each.
    """
    method = make_method(
        "prefix_rft", {"policy": {"preset": "ppo", "critic": {"kl": 0.1, "whiten": False}}}
    )
    out = look(method, batch(groups=[hybrid((0.0, 1.0))]), reference=lambda row: ramp(row) - 0.5)
    np.testing.assert_allclose(out.rows[1].streams["advantage"][1:], [0.9] * 6 + [0.95], rtol=1e-5)


def test_a_prefix_length_can_follow_the_reward():
    method = make_method(
        "prefix_rft",
        {"low": {"kind": "reward_gap", "peak": 0.9}, "high": {"kind": "reward_gap", "peak": 0.9}},
    )
    for reward, expected in ((0.0, 18), (0.5, 8), (1.0, 0)):
        commit(method, 1, {"reward/mean": reward})
        (request,) = requests(method, 1, groups=[0])
        assert (len(request.prefixes[-1]) if request.prefixes else 0) == expected


def test_rewards_of_hybrids_are_told_apart():
    """Section 3(f)4: a hybrid's success is inflated."""
    method = make_method("prefix_rft", {})
    method.rows(batch(groups=[hybrid((0.0, 1.0)), rollouts((1.0, 0.0), number=1)]))
    assert method.metrics(500) == {
        "prefix_low": 0.0,
        "reward_hybrid": 1.0,
        "reward_plain": pytest.approx(1 / 3),
    }


@pytest.mark.parametrize(
    "options", [{"keep": 1.2}, {"low": -0.1}, {"high": {"kind": "linear", "peak": 3.0}}]
)
def test_shares_are_shares(options):
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        make_method("prefix_rft", options)


# -- UFT, section 6


def hinted(rewards=(1.0, 0.0), number=0):
    """Two rollouts that were shown 9 8 and wrote 5 5 and 6."""
    g = rollouts(rewards, demo=[9, 8, 4, 3], number=number)
    a, b = g.trajectories
    return replace(
        g,
        trajectories=(forced(a, [9, 8], [5, 5], Source.HINT), forced(b, [9, 8], [6], Source.HINT)),
    )


def test_uft_by_hand():
    """A = +-0.7071 over three sampled tokens; the hint's NLL once: (0.2 + 0.3)/2; k3 at d = 0.3."""
    out = look(
        make_method("uft", {}), batch(groups=[hinted()]), reference=lambda row: ramp(row) + 0.3
    )
    a, d = 0.5 / (math.sqrt(0.5) + 1e-6), 0.3
    assert out.terms["hint"] == pytest.approx(0.25) and out.denominators == {
        "policy": 3.0,
        "kl": 3.0,
        "hint": 2.0,
    }
    assert out.loss == pytest.approx(
        -(2 * a - a) / 3 + 0.001 * (math.exp(d) - d - 1) + 0.001 * 0.25, rel=1e-4
    )
    np.testing.assert_allclose(out.gradients[0][1:3], [-0.001 / 2] * 2, rtol=1e-5)
    assert not out.gradients[1][1:3].any(), (
        "the second rollout shares the hint: its loss is counted once"
    )


def test_the_hints_gradient_is_that_of_its_nll_whatever_the_reward():
    """Section 6(g): 0.001/N_hint."""
    gradients = [
        by_source(
            look(make_method("uft", {}), batch(groups=[hinted(r), hinted(r, 1)])), Source.HINT
        )[0][1:3]
        for r in ((1, 0), (0, 0), (1, 1))
    ]
    for g in gradients:
        np.testing.assert_array_equal(g, gradients[0])
    np.testing.assert_allclose(gradients[0], -0.001 / 4, rtol=1e-6)


def test_hint_lengths_are_binomial_and_end_with_the_schedule():
    """Section 6(g): E[l]/n_seg = p(t), boundaries at whole segments, none from T on, all samples
    share the hint.
    """
    method = make_method("uft", {})
    for step, p in (
        (0, 0.05 + 0.9 * 0.5 * (1 + math.cos(math.pi / 300))),
        (149, 0.5),
        (250, 0.05 + 0.45 * (1 + math.cos(math.pi * 251 / 300))),
    ):
        lengths = np.array(
            [
                len(r.prefixes[0]) if r.prefixes else 0
                for r in requests(method, step, groups=range(2000))
            ]
        )
        assert set(lengths) <= {0, 4, 8, 12, 16, 19}, "one token is left for the model"
        share = np.where(lengths == 19, 20, lengths).mean() / 20
        assert share == pytest.approx(
            p, abs=4 * math.sqrt(p * (1 - p) / 5 / 2000) + 1e-9
        ) and method.metrics(step) == {"hint_p": pytest.approx(p)}
    assert not any(
        r.prefixes for step in (300, 301, 5000) for r in requests(method, step, groups=range(50))
    )
    short = make_method("uft", {"hint_steps": 60})
    assert (
        short.probability(29) == pytest.approx(0.5)
        and short.probability(59) == pytest.approx(0.05)
        and short.probability(60) == 0.0
    )
    (one,) = requests(method, 0, groups=[1])
    assert (
        len(one.prefixes) == BUDGET.samples
        and len({p.tobytes() for p in one.prefixes}) == 1
        and one.prefix_source == Source.HINT
    )


@pytest.mark.parametrize("tokens, boundaries", [(3, {0, 1, 2}), (7, {0, 1, 3, 4, 6}), (1, {0})])
def test_short_demonstrations_have_fewer_segments(tokens, boundaries):
    method = make_method("uft", {"p": 0.5})
    assert {
        len(r.prefixes[0]) if r.prefixes else 0 for r in requests(method, 0, tokens)
    } == boundaries


def test_a_hint_probability_can_follow_the_reward():
    method = make_method("uft", {"p": {"kind": "gate", "peak": 1.0, "threshold": 0.5}})

    def length():
        return [len(r.prefixes[0]) if r.prefixes else 0 for r in requests(method, 3, groups=[0])]

    commit(method, 3, {"reward/mean": 0.4})
    assert length() == [19]
    commit(method, 3, {"reward/mean": 0.6})
    assert length() == [0]


def test_an_empty_hint_is_a_zero():
    """Section 6(f)2."""
    out = look(make_method("uft", {}), batch(groups=[aligned([0, 1, 0, 0], None)]), half)
    assert out.terms["hint"] == 0.0 and math.isfinite(out.loss)


@pytest.mark.parametrize("name, options", [("prefix_rft", {"low": 0.9}), ("uft", {"p": 1.0})])
def test_a_long_demonstration_leaves_the_model_a_token_to_write(name, options):
    """max_tokens counts the whole response, so a prefix of that length would leave nothing to
    sample.
    """
    assert {len(r.prefixes[-1]) for r in requests(make_method(name, options), 0, max_tokens=8)} == {
        7
    }


def test_each_hybrid_keeps_its_own_share():
    """Section 3(f)6: whatever else is in the micro-batch; here one prefix has higher entropies
    throughout.
    """
    second = replace(
        hybrid(),
        group=1,
        trajectories=tuple(
            replace(t, group=1, tokens=t.tokens + 20) for t in hybrid().trajectories
        ),
    )

    def entropy(row):
        return np.arange(len(row.tokens)) + (100.0 if row.tokens[0] > 20 else 0.0)

    out = look(make_method("prefix_rft", {}), batch(groups=[hybrid(), second]), entropy=entropy)
    assert [np.flatnonzero(g).tolist() for g in by_source(out, Source.PREFIX)] == [[5, 6, 7]] * 2


@pytest.mark.parametrize("name, key", [("prefix_rft", "low"), ("uft", "p")])
def test_a_prompt_drawn_again_after_a_resume_goes_by_the_same_signals(name, key):
    """The producer may replace a filtered group of a step that was announced before the checkpoint:
    `commit` is not called again then.
    """
    one, two = (make_method(name, {key: {"kind": "reward_gap", "peak": 0.9}}) for _ in range(2))
    commit(one, 3, {"reward/mean": 0.6})
    two.load_state_dict(one.state_dict())

    def lengths(method):
        return [len(r.prefixes[-1]) if r.prefixes else 0 for r in requests(method, 3)]

    assert (
        lengths(one)
        == lengths(two)
        != lengths(make_method(name, {key: {"kind": "reward_gap", "peak": 0.9}}))
    )
