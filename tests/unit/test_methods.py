"""The methods, on numbers worked out by hand. Section numbers refer to the invariants listed in the methods dossier (docs/methods.md)."""
import math
from dataclasses import replace

import numpy as np
import pytest

from tandem.algorithms.advantages import ESTIMATORS
from tandem.algorithms.base import METHODS, Batch, Budget, make_method
from tandem.algorithms.inspect import group, inspect, trajectory
from tandem.algorithms.schedules import Schedule
from tandem.engine.types import Finish, Source

EXPERTS = (trajectory([1, 2], [5, 6, 3], expert=True), trajectory([1], [7, 3], expert=True))


def rollouts(rewards=(1.0, 0.0), behaviour=-1.0):
    return group([trajectory([1], [5, 6, 7], [behaviour] * 3), trajectory([1], [8], [behaviour])], rewards)


def aligned(rewards, demonstration_reward, number=0, prefix=False):
    """A group of four whose prompt has a demonstration, one rollout forced to start from its first two tokens if `prefix`."""
    g = group([trajectory([1], range(5, 6 + k), [-1.0] * (k + 1)) for k in range(4)], rewards, demonstration=[9, 8, 7, 3], number=number)
    if prefix:
        last = g.trajectories[-1]
        forced = replace(last, tokens=np.array([1, 9, 8, 5, 6], np.int32), source=np.array([0, 3, 3, 1, 1], np.int8), behaviour_logp=np.array([np.nan] * 3 + [-1.0] * 2, np.float32))
        g = replace(g, trajectories=(*g.trajectories[:-1], forced))
    return replace(g, demonstration_reward=demonstration_reward)


def batch(groups=None, experts=EXPERTS, step=0, **more):
    return Batch(step, (rollouts(),) if groups is None else groups, experts, **more)


def look(method, b, logp=None, **more):
    """inspect, with the streams any method may ask for."""
    return inspect(method, b, logp or ramp, entropy=lambda r: 0.1 * np.arange(len(r.tokens), dtype=np.float32), reference=lambda r: ramp(r) - 0.05, **more)


def half(row):
    return np.full(len(row.tokens), math.log(0.5), np.float32)


def ramp(row):
    return -0.1 * (1.0 + np.arange(len(row.tokens), dtype=np.float32))


def test_sft_is_the_token_mean_over_all_demonstrations():
    out = inspect(make_method("sft", {}), batch(), ramp)
    # rows: tokens at positions 2,3,4 of 5 -> 0.3+0.4+0.5; positions 1,2 of 3 -> 0.2+0.3; five tokens in all
    assert out.loss == pytest.approx((0.3 + 0.4 + 0.5 + 0.2 + 0.3) / 5)
    np.testing.assert_allclose(out.gradients[0], [0, 0, -0.2, -0.2, -0.2], rtol=1e-6)


def test_grpo_by_hand():
    out = inspect(make_method("grpo", {}), batch(), ramp)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)       # rewards 1, 0: mean 0.5, unbiased std sqrt(0.5)
    assert out.loss == pytest.approx(-(3 * a - a) / 4, rel=1e-5)
    np.testing.assert_allclose(out.gradients[0], [0, -a / 4, -a / 4, -a / 4], rtol=1e-5)
    np.testing.assert_allclose(out.gradients[1], [0, a / 4], rtol=1e-5)


def test_grpo_as_published_means_over_sequences_first():
    out = inspect(make_method("grpo", {"policy": {"reduction": "seq_mean_token_mean"}}), batch(), ramp)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(out.gradients[0], [0, -a / 6, -a / 6, -a / 6], rtol=1e-5)
    np.testing.assert_allclose(out.gradients[1], [0, a / 2], rtol=1e-5)


def test_clip_stops_the_gradient_of_tokens_already_moved_far_enough():
    moved = lambda row: ramp(row) + 0.5      # ratio e^0.5 > 1.2
    out = inspect(make_method("grpo", {}), batch(), moved, old=ramp)
    assert not out.gradients[0].any(), "positive advantage and ratio above 1 + clip_high: no gradient"
    assert out.gradients[1][1] > 0, "negative advantage and ratio above the range: still pushed down"
    assert out.metrics["policy/clip_fraction"] == pytest.approx(3 / 4)


def test_kl_is_k3_and_zero_at_the_reference():
    kl = {"policy": {"kl": 0.1}}
    assert inspect(make_method("grpo", kl), batch(), ramp, reference=ramp).terms["kl"] == 0.0
    d = 0.3
    out = inspect(make_method("grpo", kl), batch(), ramp, reference=lambda r: ramp(r) + d)
    assert out.terms["kl"] == pytest.approx(math.exp(d) - d - 1, rel=1e-5) and out.coefficients["kl"] == pytest.approx(0.1)


def test_chord_mixes_two_means_with_their_own_denominators():
    mu = 0.25
    out = inspect(make_method("chord_mu", {"mu": mu}), batch(), ramp)
    rl, sft = inspect(make_method("grpo", {}), batch(), ramp), inspect(make_method("sft", {}), batch(), ramp)
    assert out.loss == pytest.approx((1 - mu) * rl.loss + mu * sft.loss, rel=1e-6)
    assert out.denominators == {"policy": 4.0, "expert": 5.0}


@pytest.mark.parametrize("mu, parent", [(0.0, "grpo"), (1.0, "sft")])
def test_chord_at_the_ends_equals_its_parent_to_the_bit(mu, parent):
    """Section 1(g)."""
    out, alone = inspect(make_method("chord_mu", {"mu": mu}), batch(), ramp), inspect(make_method(parent, {}), batch(), ramp)
    kept = [g for g, r in zip(out.gradients, out.rows) if (r.source == Source.EXPERT).any() == (parent == "sft")]
    for ours, theirs in zip(kept, alone.gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    demand = make_method("chord_mu", {"mu": mu}).demand(0, Budget(4, 8, 16, 100), {})
    assert (demand.prompts, demand.experts) == ((4, 0) if mu == 0 else (0, 16)), "the half with weight zero is not run at all"


def test_phi_is_p_times_one_minus_p_without_gradient():
    """Section 1(g): the gradient with respect to log p is -p(1 - p)/N_demo exactly."""
    out = inspect(make_method("chord_phi", {"mu": 1.0}), batch(groups=()), half)
    np.testing.assert_allclose(out.gradients[0], [0, 0, -0.05, -0.05, -0.05], rtol=1e-6)     # 0.25 / 5
    p = lambda row: np.full(len(row.tokens), math.log(0.9), np.float32)
    np.testing.assert_allclose(inspect(make_method("chord_phi", {"mu": 1.0}), batch(groups=()), p).gradients[1], [0, -0.018, -0.018], rtol=1e-5)


def test_doubling_the_rollouts_leaves_the_expert_part_unchanged():
    """Section 1(g)."""
    one = inspect(make_method("chord_mu", {"mu": 0.5}), batch(), ramp)
    two = inspect(make_method("chord_mu", {"mu": 0.5}), batch(groups=(rollouts(), rollouts())), ramp)
    np.testing.assert_array_equal(one.gradients[-1], two.gradients[-1])
    assert one.terms["expert"] == two.terms["expert"]


def test_two_stages_equal_their_parents_and_reset_the_optimizer():
    """Section 13(g)."""
    method, budget = make_method("sft_rl", {"sft_steps": 2, "sft_learning_rate": 1e-3}), Budget(4, 8, 16, 10)
    for step, parent in ((0, "sft"), (1, "sft"), (2, "grpo")):
        assert inspect(method, batch(step=step), ramp).loss == inspect(make_method(parent, {}), batch(step=step), ramp).loss
    first, then = method.demand(1, budget, {}), method.demand(2, budget, {})
    assert (first.prompts, first.experts, first.learning_rate) == (0, 16, 1e-3) and (then.prompts, then.experts, then.learning_rate) == (4, 0, None)
    assert first.optimizer != then.optimizer


@pytest.mark.parametrize("level, expected", [("token", [2.0, 0.5]), ("sequence", [2.0, 1.0])])
def test_rollout_correction_truncates_the_mismatch(level, expected):
    """Section 14.4: w = exp(log pi_old - log pi_rollout), capped at 2; off when rollouts are fresh."""
    logp = lambda row: np.full(len(row.tokens), -1.0, np.float32)
    g = group([trajectory([1], [5, 6], [-3.0, -1.0 + math.log(2)]), trajectory([1], [7], [-1.0])], [1.0, 0.0])
    make = lambda correction: make_method("grpo", {"policy": {"correction": correction, "advantage": "dr_grpo"}})
    out = inspect(make(level), batch(groups=(g,)), logp)
    if level == "sequence":
        expected = [2.0, 2.0]   # e^2 * e^-ln2 = 3.69, capped for the whole row
    np.testing.assert_allclose(out.gradients[0][1:], -0.5 * np.array(expected) / 3, rtol=1e-5)
    plain = inspect(make("none"), batch(groups=(g,)), logp)
    on_policy, stale = (inspect(make("auto"), batch(groups=(g,), off_policy=o), logp) for o in (False, True))
    assert on_policy.loss == plain.loss and stale.loss == inspect(make("token"), batch(groups=(g,)), logp).loss


def test_advantages():
    """Section 14.7."""
    r = np.array([1.0, 0.0, 0.0, 3.0])
    one = lambda name, rewards: ESTIMATORS[name]([rewards], [np.ones(len(rewards))])[0]
    np.testing.assert_allclose(one("dr_grpo", r), [0, -1, -1, 2])
    np.testing.assert_allclose(one("rloo", r), one("dr_grpo", r) * 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(one("grpo", r), one("dr_grpo", r) / (math.sqrt(2.0) + 1e-6), rtol=1e-6)
    for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"):
        np.testing.assert_allclose(one(name, r + 5), one(name, r), atol=1e-6)
        assert not one(name, np.ones(4)).any() and not one(name, np.ones(1)).any()


def test_reinforce_pp_is_white_over_the_tokens_of_the_batch():
    """Section 14.1: rewards 1, 0 with 3 and 1 tokens: mean 3/4, unbiased variance (3 (1/4)^2 + (3/4)^2)/3 = 1/4."""
    a, b = ESTIMATORS["reinforce_pp"]([np.array([1.0]), np.array([0.0])], [np.array([3]), np.array([1])])
    np.testing.assert_allclose([a[0], b[0]], [0.5, -1.5], rtol=1e-6)


@pytest.mark.parametrize("preset", ["grpo", "cispo", "gspo", "rloo"])
def test_on_policy_the_objectives_have_the_gradient_of_reinforce(preset):
    """Section 14.7: rho = 1."""
    make = lambda preset, **more: make_method("grpo", {"policy": {"preset": preset, "advantage": "grpo", "reduction": "seq_mean_token_mean", **more}})
    ours, plain = inspect(make(preset), batch(), ramp), inspect(make("grpo", objective="reinforce"), batch(), ramp)
    for a, b in zip(ours.gradients, plain.gradients):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_gspo_clips_whole_sequences():
    """Ratio of the sequence: mean of (0.5, 0.5, -0.85) is 0.05 > 0.0004, so a positive advantage gets no gradient anywhere, though one token went down."""
    moved = lambda row: ramp(row) + (np.array([0, 0.5, 0.5, -0.85], np.float32) if len(row.tokens) == 4 else 0)
    out = inspect(make_method("grpo", {"policy": "gspo"}), batch(), moved, old=ramp)
    assert not out.gradients[0].any()
    # one token: the sequence ratio is PPO's
    ppo, gspo = (inspect(make_method("grpo", {"policy": {"preset": p, "clip_low": 0.2, "clip_high": 0.2}}), batch(groups=(
        group([trajectory([1], [5], [-1.0]), trajectory([1], [8], [-1.0])], [1, 0]),)), lambda r: ramp(r) + 0.1, old=ramp) for p in ("grpo", "gspo"))
    assert gspo.loss == pytest.approx(ppo.loss, rel=1e-6)


def test_cispo_keeps_a_bounded_gradient_where_ppo_has_none():
    moved = lambda row: ramp(row) + 0.5
    out = inspect(make_method("grpo", {"policy": "cispo"}), batch(), moved, old=ramp)
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(out.gradients[0][1:], [-1.2 * a / 4] * 3, rtol=1e-5)


def test_dynamic_sampling_redraws_groups_without_spread():
    method = make_method("grpo", {"policy": "dapo"})
    assert method.accept(rollouts()) and not method.accept(rollouts((1.0, 1.0))) and not method.accept(rollouts((0.0, 0.0)))


def test_truncated_responses_can_be_left_out():
    cut = group([trajectory([1], [5, 6], [-1.0] * 2, finish=Finish.LENGTH), trajectory([1], [8], [-1.0])], [0, 1])
    out = inspect(make_method("grpo", {"policy": {"mask_truncated": True}}), batch(groups=(cut,)), ramp)
    assert not out.gradients[0].any() and out.gradients[1].any() and out.denominators["policy"] == 1.0


def test_entropy_bonus_is_its_own_term():
    out = inspect(make_method("grpo", {"policy": {"entropy_bonus": 0.01}}), batch(), ramp, entropy=lambda r: np.full(len(r.tokens), 0.7))
    assert out.terms["entropy"] == pytest.approx(-0.7) and out.coefficients["entropy"] == 0.01


def test_schedules():
    cosine = Schedule("cosine", peak=0.9, valley=0.05, warmup=10, decay=100)
    assert cosine(0) == 0.0 and cosine(10) == 0.9 and cosine(110) == pytest.approx(0.05) and cosine(500) == pytest.approx(0.05)
    assert cosine(60) == pytest.approx((0.9 + 0.05) / 2)
    values = [cosine(t) for t in range(10, 120)]
    assert values == sorted(values, reverse=True)
    assert [Schedule("step", peak=1.0, decay=2)(t) for t in range(4)] == [1, 1, 0, 0]
    assert [Schedule("periodic", peak=1.0, period=3)(t) for t in range(4)] == [1, 0, 0, 1]
    assert [Schedule("linear", peak=1.0, decay=4)(t) for t in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]
    with pytest.raises(ValueError, match="did you mean 'warmup'"):
        Schedule.parse({"kind": "cosine", "warm_up": 3})


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["no experts", "no rollouts", "all right", "all wrong", "group of one", "demonstrations", "nothing"])
def test_every_method_stays_finite(name, case):
    groups, experts = (rollouts(),), EXPERTS
    if case in ("no experts", "nothing"):
        experts = ()
    if case in ("no rollouts", "nothing"):
        groups = ()
    if case.startswith("all"):
        groups = (rollouts((1.0, 1.0) if case == "all right" else (0.0, 0.0)),)
    if case == "group of one":
        groups = (group([trajectory([1], [5, 6])], [1.0]),)
    if case == "demonstrations":
        groups = (aligned([0, 0, 0, 1], 1.0), aligned([0, 0, 0, 0], 1.0, number=1, prefix=True), aligned([1, 1, 1, 1], None, number=2))
    out = look(make_method(name, {}), batch(groups=groups, experts=experts))
    assert math.isfinite(out.loss) and all(np.isfinite(g).all() for g in out.gradients)


@pytest.mark.parametrize("name", METHODS)
def test_loss_does_not_depend_on_packing_or_row_order(name):
    many = tuple(aligned([0, 1, 0, 2] if n else [0, 0, 0, 0], 1.0, number=n, prefix=n == 2) for n in range(3))
    whole = look(make_method(name, {}), batch(groups=many))
    split = look(make_method(name, {}), batch(groups=many[::-1], experts=EXPERTS[::-1]), micro_batch_tokens=12, ranks=2)
    assert split.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-6)
    for term, value in whole.terms.items():
        assert split.terms[term] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(ValueError, match="did you mean 'chord_mu'"):
        make_method("chord_mi", {})
    with pytest.raises(ValueError, match="did you mean 'sft_steps'"):
        make_method("sft_rl", {"sft_step": 3})
