"""SFT, GRPO and the options of the RL layer, on numbers worked out by hand.

Sections are those of the methods dossier: 0.1 and 14.

The engine's own invariants (section 0.6: any split of a batch gives one gradient, an absent source
gives exactly 0) and the reductions of section 0.3 are in tests/unit/learner and
tests/e2e/test_learner_zero.py; the token objectives over a grid of ratios in test_objectives.py.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_cases import GRPO_LOSS, SFT_LOSS, A, batch, constant, look, ramp, rollouts

from tandem.algorithms.parts.advantages import ESTIMATORS
from tandem.algorithms.parts.objectives.nll import NLL, ExpertRatio
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.policy import PRESETS, PolicyLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Finish
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect


def grpo(**policy):
    return make_method("grpo", {"policy": policy})


def test_sft_is_the_token_mean_over_all_demonstrations():
    out = inspect(make_method("sft", {}), batch(), ramp)
    assert out.loss == pytest.approx(SFT_LOSS)
    np.testing.assert_allclose(out.gradients[0], [0, 0, -0.2, -0.2, -0.2], rtol=1e-6)


def pad(values, fill):
    """A tensor of lists of unlike length, `fill` behind the short ones."""
    width = max(len(v) for v in values)
    return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])


def test_sft_has_the_gradient_of_transformers_token_mean():
    """Section 13(g).

    Two accumulated batches, padded, through transformers' own loss with its count of all labels;
    ours packed, through the chunked head.
    """
    import transformers

    from tandem.algorithms.base import Batch
    from tandem.engine.learner.packing import pack
    from tandem.engine.learner.terms import denominators, make_tokens, micro_batch_loss
    from tandem.engine.model.policy import Policy
    from tandem.engine.model.view import View

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
    experts = tuple(
        trajectory(range(3, 3 + n), range(20, 21 + 2 * n), expert=True) for n in (1, 4, 2, 7)
    )
    count = sum(2 * n + 1 for n in (1, 4, 2, 7))
    for part in (experts[:2], experts[2:]):
        labels = pad([np.where(t.source == 2, t.tokens, -100).tolist() for t in part], -100)
        mask = pad([[1] * len(t.tokens) for t in part], 0)
        model(
            input_ids=pad([t.tokens.tolist() for t in part], 0),
            attention_mask=mask,
            labels=labels,
            num_items_in_batch=count,
        ).loss.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    policy, method = Policy(model), make_method("sft", {})
    b = Batch(0, (), experts)
    rows, terms = method.rows(b), method.terms(b)
    for micro in pack(rows, terms, 1, 16, 0)[0]:
        arrays = (micro.tokens, micro.positions, micro.index, micro.target)
        view = View.of_one_row(*map(torch.as_tensor, arrays))
        tokens = make_tokens(micro, policy(replace(view, chunk=16)))
        micro_batch_loss(terms, denominators(terms, rows), micro, tokens)[0].backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name], rtol=1e-4, atol=1e-6)


def test_grpo_by_hand():
    out = inspect(grpo(), batch(), ramp)
    assert out.loss == pytest.approx(GRPO_LOSS, rel=1e-5)
    np.testing.assert_allclose(out.gradients[0], [0, -A / 4, -A / 4, -A / 4], rtol=1e-5)
    np.testing.assert_allclose(out.gradients[1], [0, A / 4], rtol=1e-5)


@pytest.mark.parametrize(
    "preset, length, first, second",
    [
        ("grpo", None, A / 4, A / 4),  # token mean over four tokens
        ("dapo", None, A / 4, A / 4),
        ("cispo", None, A / 4, A / 4),
        # mean over 3 tokens, then over 2 sequences
        ("gspo", None, A / 6, A / 2),
        # R - mean, two rows times the constant
        ("dr_grpo", 10, 0.5 / 20, 0.5 / 20),
        # R - the other's; sums, mean over two rows
        ("rloo", None, 1.0 / 2, 1.0 / 2),
        # 1, 1, 1, 0 over tokens: mean 3/4, unbiased std 1/2
        ("reinforce_pp", None, 0.5 / 4, 1.5 / 4),
        # 1/2, 1/2, 1/2, -1/2 the same but for a shift
        ("reinforce_pp_baseline", None, 0.5 / 4, 1.5 / 4),
        # sum over the constant, not over rows
        ("luffy_code", 10, 0.5 / 10, 0.5 / 10),
    ],
)
def test_presets_by_hand(preset, length, first, second):
    """Sections 14.1 to 14.3: on policy, the gradient on the three tokens of the right rollout and
    on the one token of the wrong one.
    """
    out = look(grpo(preset=preset, **({"reduction_length": length} if length else {})), batch())
    np.testing.assert_allclose(out.gradients[0], [0, -first, -first, -first], rtol=1e-5)
    np.testing.assert_allclose(out.gradients[1], [0, second], rtol=1e-5)


def test_every_preset_is_in_the_table_above():
    tested = next(m for m in test_presets_by_hand.pytestmark if m.name == "parametrize").args[1]
    assert {row[0] for row in tested} == {
        name for name, options in PRESETS.items() if options.get("advantage") != "gae"
    }, "a critic has tests of its own"


def test_policy_options_start_from_a_preset_or_from_the_methods_defaults():
    defaults = {"advantage": "dr_grpo", "entropy_bonus": 0.01}
    assert PolicyLoss.parse({"kl": 0.1}, **defaults) == PolicyLoss(
        advantage="dr_grpo", entropy_bonus=Schedule(peak=0.01), kl=Schedule(peak=0.1)
    )
    assert PolicyLoss.parse("grpo", **defaults) == PolicyLoss()
    assert PolicyLoss.parse({"preset": "dapo", "clip_low": 0.1}, **defaults) == PolicyLoss(
        clip_high=0.28, clip_low=0.1, dynamic_sampling=True
    )
    with pytest.raises(ValueError, match="did you mean 'dapo'"):
        PolicyLoss.parse("dapoo")
    with pytest.raises(ValueError, match="length"):
        PolicyLoss.parse("dr_grpo")


@pytest.mark.parametrize(
    "objective, w, largest, at, peak, peak_at",
    [
        (NLL("one"), lambda p: 1 + 0 * p, 1.0, None, 1.0, 0.0),
        (NLL("p"), lambda p: p, 1.0, 1.0, 1 / 4, 1 / 2),
        (NLL("phi"), lambda p: p * (1 - p), 1 / 4, 1 / 2, 4 / 27, 1 / 3),
        (ExpertRatio(0.1), lambda p: 0.1 * p / (p + 0.1) ** 2, 1 / 4, 0.1, 0.2273, 0.1 / 1.2),
        (ExpertRatio(None), lambda p: p, 1.0, 1.0, 1 / 4, 1 / 2),
    ],
)
def test_weights_on_expert_tokens(objective, w, largest, at, peak, peak_at):
    """Section 0.1, the cheat sheet: w on grad log pi, and w (1 - p), what reaches the logit of the
    target token.
    """
    p = torch.linspace(1e-4, 1 - 1e-4, 9999, dtype=torch.float64)
    logp = p.log().requires_grad_()
    zeros = torch.zeros(len(p), dtype=torch.int64)
    loss, _ = objective(
        Tokens(logp, zeros, zeros, zeros.to(torch.int8), {"advantage": torch.ones_like(p)})
    )
    loss.sum().backward()
    found = -logp.grad
    torch.testing.assert_close(found, w(p))
    assert found.max().item() == pytest.approx(largest, abs=2e-4) and (
        at is None or p[found.argmax()].item() == pytest.approx(at, abs=2e-3)
    )
    logit = found * (1 - p)
    assert logit.max().item() == pytest.approx(peak, abs=2e-4) and p[
        logit.argmax()
    ].item() == pytest.approx(peak_at, abs=2e-3)


def test_clip_stops_the_gradient_of_tokens_already_moved_far_enough():
    def moved(row):
        return ramp(row) + 0.5  # ratio e^0.5 > 1.2

    out = inspect(grpo(), batch(), moved, old=ramp)
    assert not out.gradients[0].any(), (
        "positive advantage and ratio above 1 + clip_high: no gradient"
    )
    assert out.gradients[1][1] > 0, (
        "negative advantage and ratio above the range: still pushed down"
    )
    assert out.metrics["policy/clip_fraction"] == pytest.approx(3 / 4)


def test_dual_clip_bounds_what_a_wrong_token_costs():
    """Section 14.2: A < 0 and rho = e^2 > 3: the loss is -3A and the gradient gone."""

    def moved(row):
        return ramp(row) + 2.0

    out, plain = (
        inspect(grpo(dual_clip=c), batch(groups=[rollouts()]), moved, old=ramp) for c in (3.0, None)
    )
    assert out.gradients[1][1] == 0.0 and plain.gradients[1][1] == pytest.approx(
        A * math.exp(2) / 4, rel=1e-5
    )
    assert out.loss == pytest.approx((-3 * A * 1.2 + 3 * A) / 4, rel=1e-5)


def test_without_bounds_nothing_is_clipped():
    """Section 14.7: eps = inf, the ratio itself."""

    def moved(row):
        return ramp(row) + 0.5

    out = inspect(grpo(clip_low=math.inf, clip_high=math.inf), batch(), moved, old=ramp)
    np.testing.assert_allclose(out.gradients[0][1:], [-A * math.exp(0.5) / 4] * 3, rtol=1e-5)
    assert out.metrics["policy/clip_fraction"] == 0


def test_kl_is_k3_and_zero_at_the_reference():
    assert inspect(grpo(kl=0.1), batch(), ramp, reference=ramp).terms["kl"] == 0.0
    d = 0.3
    out = inspect(grpo(kl=0.1), batch(), ramp, reference=lambda r: ramp(r) + d)
    assert out.terms["kl"] == pytest.approx(math.exp(d) - d - 1, rel=1e-5) and out.coefficients[
        "kl"
    ] == pytest.approx(0.1)


def test_entropy_bonus_is_its_own_term():
    out = inspect(grpo(entropy_bonus=0.01), batch(), ramp, entropy=constant(0.7))
    assert out.terms["entropy"] == pytest.approx(-0.7) and out.coefficients["entropy"] == 0.01


def test_coefficients_of_regularisers_take_schedules():
    method = grpo(
        kl={"kind": "linear", "peak": 0.4, "decay": 4},
        entropy_bonus={"kind": "reward_gap", "peak": 0.5},
    )
    out = look(method, batch(step=3, signals={"reward/mean": 0.2}))
    assert out.coefficients == {
        "policy": 1.0,
        "kl": pytest.approx(0.1),
        "entropy": pytest.approx(0.3),
    }


@pytest.mark.parametrize(
    "level, mode, expected",
    [
        ("token", "truncate", [2.0, 0.5]),
        ("token", "mask", [0.0, 0.5]),
        ("sequence", "truncate", [2.0, 2.0]),
        ("sequence", "mask", [0.0, 0.0]),
    ],
)
def test_rollout_correction(level, mode, expected):
    """Section 14.4: w = exp(log pi_old - log pi_rollout) is e^2 and 1/2; cap 2.

    Whole sequence: e^2/2 = 3.69.
    """
    g = group(
        [trajectory([1], [5, 6], [-3.0, -1.0 + math.log(2)]), trajectory([1], [7], [-1.0])],
        [1.0, 0.0],
    )

    def make(correction):
        return grpo(correction=correction, advantage="dr_grpo", correction_mode=mode)

    out = inspect(make(level), batch(groups=[g]), constant(-1.0))
    np.testing.assert_allclose(out.gradients[0][1:], -0.5 * np.array(expected) / 3, rtol=1e-5)
    plain = inspect(make("none"), batch(groups=[g]), constant(-1.0))
    on_policy, stale = (
        inspect(make("auto"), batch(groups=[g], off_policy=o), constant(-1.0))
        for o in (False, True)
    )
    assert (
        on_policy.loss == plain.loss
        and stale.loss == inspect(make("token"), batch(groups=[g]), constant(-1.0)).loss
    )


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_correction_is_the_identity_without_mismatch(level):
    """Section 14.7: pi_roll = pi_old, any cap >= 1."""
    g = replace(
        rollouts(),
        trajectories=tuple(
            replace(t, behaviour_logp=ramp(t).astype(np.float32)) for t in rollouts().trajectories
        ),
    )
    ours, plain = (
        inspect(grpo(correction=c, correction_cap=1e9), batch(groups=[g]), ramp)
        for c in (level, "none")
    )
    assert ours.loss == plain.loss
    for a, b in zip(ours.gradients, plain.gradients, strict=True):
        np.testing.assert_array_equal(a, b)


def test_advantages():
    """Section 14.7."""
    r = np.array([1.0, 0.0, 0.0, 3.0])

    def one(name, rewards):
        return ESTIMATORS[name]([rewards], [np.ones(len(rewards))])[0]

    np.testing.assert_allclose(one("dr_grpo", r), [0, -1, -1, 2])
    np.testing.assert_allclose(one("rloo", r), [0, -4 / 3, -4 / 3, 8 / 3], rtol=1e-6)
    np.testing.assert_allclose(
        one("grpo", r), one("dr_grpo", r) / (math.sqrt(2.0) + 1e-6), rtol=1e-6
    )
    for name in ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"):
        np.testing.assert_allclose(one(name, r + 5), one(name, r), atol=1e-6)
        assert not one(name, np.full(7, 0.1, np.float32)).any() and not one(name, np.ones(1)).any()


@pytest.mark.parametrize("preset", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_a_constant_on_all_rewards_changes_no_gradient_and_equal_rewards_have_none(preset):
    """Section 14.7."""
    method = grpo(preset=preset, **({"reduction_length": 8} if preset == "dr_grpo" else {}))
    plain, shifted, equal = (
        inspect(method, batch(groups=[rollouts(r)]), ramp)
        for r in ((1.0, 0.0), (4.0, 3.0), (1.0, 1.0))
    )
    for a, b, none in zip(plain.gradients, shifted.gradients, equal.gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        assert not none.any() and a.any()


def test_reinforce_pp_is_white_over_the_tokens_of_the_batch():
    """Section 14.1: rewards 1, 0 with 3 and 1 tokens: mean 3/4, unbiased variance (3 (1/4)^2 +
    (3/4)^2)/3 = 1/4.
    """
    a, b = ESTIMATORS["reinforce_pp"](
        [np.array([1.0]), np.array([0.0])], [np.array([3]), np.array([1])]
    )
    np.testing.assert_allclose([a[0], b[0]], [0.5, -1.5], rtol=1e-6)


@pytest.mark.parametrize("preset", ["grpo", "cispo", "gspo", "rloo"])
def test_on_policy_the_objectives_have_the_gradient_of_reinforce(preset):
    """Section 14.7: rho = 1."""

    def make(preset, **more):
        return grpo(preset=preset, advantage="grpo", reduction="seq_mean_token_mean", **more)

    ours, plain = (
        inspect(make(preset), batch(), ramp),
        inspect(make("grpo", objective="reinforce"), batch(), ramp),
    )
    for a, b in zip(ours.gradients, plain.gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_gspo_clips_whole_sequences():
    """Ratio of the sequence: mean of (0.5, 0.5, -0.85) is 0.05 > 0.0004, so a positive advantage
    gets no gradient anywhere, though one token went down.
    """

    def moved(row):
        return ramp(row) + (
            np.array([0, 0.5, 0.5, -0.85], np.float32) if len(row.tokens) == 4 else 0
        )

    out = inspect(grpo(preset="gspo"), batch(), moved, old=ramp)
    assert not out.gradients[0].any()
    # one token: the sequence ratio is PPO's
    ppo, gspo = (
        inspect(
            grpo(preset=p, clip_low=0.2, clip_high=0.2),
            batch(
                groups=[group([trajectory([1], [5], [-1.0]), trajectory([1], [8], [-1.0])], [1, 0])]
            ),
            lambda r: ramp(r) + 0.1,
            old=ramp,
        )
        for p in ("grpo", "gspo")
    )
    assert gspo.loss == pytest.approx(ppo.loss, rel=1e-6)


def test_cispo_keeps_a_bounded_gradient_where_ppo_has_none():
    """Section 14.2."""
    out = inspect(grpo(preset="cispo"), batch(), lambda row: ramp(row) + 0.5, old=ramp)
    np.testing.assert_allclose(out.gradients[0][1:], [-1.2 * A / 4] * 3, rtol=1e-5)


def test_dynamic_sampling_redraws_groups_without_spread():
    """Section 14.3."""
    method = grpo(preset="dapo")
    assert (
        method.accept(rollouts())
        and not method.accept(rollouts((1.0, 1.0)))
        and not method.accept(rollouts((0.0, 0.0)))
    )


def test_truncated_responses_can_be_left_out_of_every_term():
    """Section 14.3, overlong filtering."""
    cut = group(
        [trajectory([1], [5, 6], [-1.0] * 2, finish=Finish.LENGTH), trajectory([1], [8], [-1.0])],
        [0, 1],
    )
    out = look(grpo(mask_truncated=True, kl=0.1, entropy_bonus=0.1), batch(groups=[cut]))
    assert not out.gradients[0].any() and out.gradients[1].any()
    assert out.denominators == {"policy": 1.0, "kl": 1.0, "entropy": 1.0}


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(ValueError, match="did you mean 'chord_mu'"):
        make_method("chord_mi", {})
    with pytest.raises(ValueError, match="did you mean 'sft_steps'"):
        make_method("sft_rl", {"sft_step": 3})
