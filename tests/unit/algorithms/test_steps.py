"""Methods that decide per prompt or per step which loss it is: ReLIFT, SASR, HPT. Sections 4, 5 and
8 of the methods dossier.
"""

import math

import numpy as np
import pytest
from method_cases import (
    BUDGET,
    EXPERTS,
    GRPO_LOSS,
    SFT_LOSS,
    A,
    aligned,
    batch,
    by_source,
    commit,
    constant,
    drive,
    kind_of,
    look,
    rollouts,
)

from tandem.algorithms.registry import make_method
from tandem.engine.core.types import Source

DEMO = [5, 6, 3]


def wrong(number=0, demo=DEMO):
    return rollouts((0, 0), demo=demo, number=number)


# -- ReLIFT, section 4


def test_relift_by_hand():
    """RL step: GRPO; SFT step: -log p of three tokens at positions 1, 2, 3 under `ramp`, minus
    alpha times the entropy.
    """
    method = make_method("relift", {"buffer": 1, "alpha": 0.01})
    out = look(method, batch(groups=[rollouts(), wrong(1)]))
    assert out.loss == pytest.approx(GRPO_LOSS / 2, rel=1e-5) and method.metrics(0) == {
        "buffer": 1.0,
        "demonstrations_used": 0.0,
    }
    assert kind_of(method.demand(1, BUDGET, {})) == "sft"
    out = look(method, batch(groups=(), step=1), entropy=constant(0.7))
    assert out.loss == pytest.approx(0.3 - 0.01 * 0.7, rel=1e-5)
    np.testing.assert_allclose(out.gradients[0], [0, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)
    assert (
        method.metrics(1) == {"buffer": 0.0, "demonstrations_used": 1.0}
        and kind_of(method.demand(2, BUDGET, {})) == "rl"
    )


def test_relift_buffers_what_nothing_solved():
    """Section 4(c): paper accuracy 0; as code all rewards exactly 0, so that a format penalty keeps
    a prompt out.
    """
    groups = [
        wrong(0),
        rollouts((1, 0), demo=DEMO, number=1),
        rollouts((-1, 0), demo=DEMO, number=2),
        rollouts((0, 0), number=3),
    ]
    paper, code = (
        make_method("relift", {}),
        make_method("relift", {"as": "code", "policy": {"reduction_length": 10}}),
    )
    for method, expected in ((paper, [0, 2]), (code, [0])):
        look(method, batch(groups=groups))
        assert [t.group for t in method.waiting] == expected


def test_relift_variants():
    for variant in ("paper", "code"):
        method = make_method(
            "relift",
            {"as": variant, **({"policy": {"reduction_length": 10}} if variant == "code" else {})},
        )
        assert method.entropy_weight(0) == (1e-4 if variant == "paper" else 1e-3)
        assert look(method, batch(groups=[rollouts()])).coefficients == (
            {"policy": 1.0} if variant == "paper" else {"policy": 1.0, "entropy": 0.001}
        )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [[0, 1], [2, 3], [4]]),  # a plain buffer: oldest first
        # each step's in front, in the step's order; taken from the front
        ({"as": "code"}, [[3, 4], [0, 1], [2]]),
        # the authors' later code appends
        ({"as": "code", "newest_first": False}, [[0, 1], [2, 3], [4]]),
        ({"newest_first": True}, [[3, 4], [0, 1], [2]]),
    ],
)
def test_relift_takes_from_its_buffer_in_the_order_of_the_code(options, expected):
    """Section 4(c).

    Three prompts fail in one step and two in the next; then two SFT steps of two, and one is left.
    """
    policy = {"policy": {"reduction_length": 10}} if "as" in options else {}
    method = make_method("relift", {"buffer": 2, **policy, **options})
    taken = []
    for numbers in ((0, 1, 2), (3, 4)):
        look(method, batch(groups=[wrong(n, demo=[10 + n, 3]) for n in numbers]))
    for step in (2, 3):
        rows = method.rows(batch(groups=(), step=step))
        taken.append([int(row.tokens[1]) - 10 for row in rows])
    assert [*taken, [t.group for t in method.waiting]] == expected


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_relift_makes_as_many_sft_steps_as_the_buffer_filled(staleness):
    """Section 4(g): floor(pushed / M), also where steps are announced ahead; each takes exactly M,
    its moments are its own, and leaves RL's alone.
    """
    method = make_method("relift", {"buffer": 3})
    record, _ = drive(method, range(40), staleness=staleness)
    sft = [(demand, rows) for demand, rows, *_ in record if kind_of(demand) == "sft"]
    ahead = len(method.planned)
    assert (
        len(sft) > 4
        and method.pushed // 3 - staleness - 1 <= len(sft) + ahead <= method.pushed // 3
    )
    assert (
        all(len(rows) == 3 for _, rows in sft)
        and method.consumed == 3 * len(sft)
        and method.pushed == method.consumed + len(method.waiting)
    )
    assert {demand.optimizer for demand, _ in sft} == {"sft"} and {
        d.optimizer for d, *_ in record if kind_of(d) == "rl"
    } == {"main"}


def test_relift_has_made_every_sft_step_once_its_buffer_is_below_a_batch():
    """Section 4(g): number of SFT steps == floor(pushed / M), exactly, and the rest waits."""
    method = make_method("relift", {"buffer": 3})
    record, _ = drive(method, range(40))
    made, step = sum(kind_of(demand) == "sft" for demand, *_ in record), 40
    while kind_of(commit(method, step, {})) == "sft":
        look(method, batch(groups=(), step=step))
        made, step = made + 1, step + 1
    assert made == method.pushed // 3 > 4 and len(method.waiting) == method.pushed % 3


def test_relift_feeds_its_buffer_under_dynamic_sampling():
    method = make_method("relift", {"policy": "dapo"})
    assert (
        method.accept(wrong())
        and not method.accept(rollouts((1, 1), demo=DEMO))
        and not method.accept(rollouts((0, 0)))
    )


def test_relift_resumed_does_not_announce_an_sft_step_twice():
    """Step 5 was announced before the checkpoint, with all that the buffer holds: step 6 must not
    take the same demonstrations.
    """
    one, two = (make_method("relift", {"buffer": 2}) for _ in range(2))
    look(one, batch(groups=[wrong(0), wrong(1)]))
    assert kind_of(commit(one, 5, {})) == "sft"
    two.load_state_dict(one.state_dict())
    assert [kind_of(two.demand(step, BUDGET, {})) for step in (6, 5)] == ["rl", "sft"] and [
        t.group for t in two.waiting
    ] == [0, 1]


def test_any_reward_above_zero_is_a_success_for_both_gates():
    """Sections 4(b) and 8(b): ReFT's 0.1 for a readable answer as well; a reward that means failure
    has to be 0 or less.
    """
    partial = rollouts((0.1, 0.0), demo=DEMO)
    assert not make_method("relift", {}).hardest(partial) and not make_method("hpt", {}).gated(
        partial
    )


def test_hpts_entropy_bonus_covers_demonstrations_as_code_only():
    """Section 8(a): by default an expectation under the policy; the failed group leaves a
    demonstration of three tokens, the other four of rollouts.
    """
    groups = [rollouts((1, 0), demo=DEMO), wrong(1)]
    for options, tokens in (
        ({"policy": {"entropy_bonus": 0.001}}, 4),
        ({"as": "code", "policy": {"reduction_length": 10}}, 7),
    ):
        rows = make_method("hpt", options).rows(batch(groups=groups))
        assert (
            sum(int(row.weights["entropy"].sum()) for row in rows if "entropy" in row.weights)
            == tokens
        )


# -- SASR, section 5


def warm_sasr(g_warm=2.0, g_last=2.0, **options):
    method = make_method("sasr", {"warmup": 1, **options})
    method.observe(0, {"loss/expert": 1.0, "grad_norm": g_warm})
    method.observe(5, {"loss/expert": 1.0, "grad_norm": g_last})
    return method


@pytest.mark.parametrize(
    "last, gamma, expected",
    [
        (2.0, 1.0, 1 / 2),
        (2.0, 3.0, 1 / 4),
        (1.0, 1.0, 1 / 3),
        (6.0, 0.5, 6 / 7),
        (2.0, 0.0, 1.0),
        (2.0, 1e12, 0.0),
    ],
)
def test_sasr_probability_by_hand(last, gamma, expected):
    """Section 5(g): G/(G + gamma G_warm): 1/(1 + gamma) where nothing changed; gamma 0 is pure SFT,
    gamma without end pure RL.
    """
    method = warm_sasr(g_last=last, gamma=gamma)
    assert method.p(6, {}) == pytest.approx(expected, abs=1e-9)
    kinds = [kind_of(method.demand(step, BUDGET, {})) for step in range(6, 406)]
    assert kinds.count("sft") / 400 == pytest.approx(
        expected, abs=0.1 if 0 < expected < 1 else 1e-12
    )


def test_sasr_resumed_draws_by_the_norms_it_had():
    """G_last 1, G_warm 2 and gamma 1: 1/3, and the same switch at every step."""
    one, two = warm_sasr(2.0, 1.0), make_method("sasr", {"warmup": 1})
    two.load_state_dict(one.state_dict())
    assert two.p(6, {}) == pytest.approx(1 / 3)
    assert [one.demand(step, BUDGET, {}) for step in range(6, 60)] == [
        two.demand(step, BUDGET, {}) for step in range(6, 60)
    ]


def test_sasr_losses_by_hand():
    method = make_method("sasr", {"warmup": 1})
    assert look(method, batch(groups=())).loss == pytest.approx(SFT_LOSS) and look(
        method, batch(experts=())
    ).loss == pytest.approx(GRPO_LOSS, rel=1e-5)
    # the paper's warm-up: (0.3 + 0.4 + 0.5 + 0.2 + 0.3)/2
    summed = make_method("sasr", {"sft_reduction": "seq_mean_token_sum"})
    assert look(summed, batch(groups=())).loss == pytest.approx(0.85)


def test_sasr_norms_come_from_sft_steps_alone():
    """Section 5(f)1; an RL step's or a broken norm changes nothing."""
    method = warm_sasr(2.0, 1.0)
    for metrics in (
        {"loss/policy": 1.0, "grad_norm": 50.0},
        {"loss/expert": 1.0, "grad_norm": math.nan},
        {"empty": 1.0},
    ):
        method.observe(9, metrics)
    assert (method.g_warm, method.g_last) == (2.0, 1.0) and method.metrics(9) == {
        "sft_probability": pytest.approx(1 / 3),
        "sft_norm_ratio": 0.5,
    }


def test_sasr_with_a_forced_switch_is_sft_sft_grpo_grpo():
    """Section 5(g)."""
    method = make_method(
        "sasr", {"warmup": 1, "probability": {"kind": "step", "peak": 1.0, "decay": 2}}
    )
    losses = []
    for step in range(4):
        demand = method.demand(step, BUDGET, {})
        losses.append(
            look(
                method,
                batch(
                    groups=[rollouts()] if demand.prompts else (),
                    experts=EXPERTS if demand.experts else (),
                    step=step,
                ),
            ).loss
        )
    assert losses == pytest.approx([SFT_LOSS, SFT_LOSS, GRPO_LOSS, GRPO_LOSS], rel=1e-5)


def test_sasr_reports_the_probability_that_it_will_draw_by():
    """Also with a schedule of the reward, right after an SFT step, which has none: 0.8 - 0.3."""
    method = make_method("sasr", {"warmup": 1, "probability": {"kind": "reward_gap", "peak": 0.8}})
    method.rows(batch(groups=[], step=5, signals={"reward/mean": 0.3}))
    method.observe(5, {"loss/expert": 1.0, "grad_norm": 1.0})
    assert (
        method.metrics(5)["sft_probability"]
        == pytest.approx(0.5)
        == pytest.approx(method.p(6, {"reward/mean": 0.3}))
    )


def test_sasr_warm_up_is_sft_and_shares_its_moments():
    method = make_method("sasr", {"warmup": 5, "probability": 0.0, "sft_learning_rate": 1e-3})
    demands = [method.demand(step, BUDGET, {}) for step in range(8)]
    assert [kind_of(d) for d in demands] == ["sft"] * 5 + ["rl"] * 3 and {
        d.optimizer for d in demands
    } == {"main"}
    assert demands[0].learning_rate == 1e-3 and demands[7].learning_rate is None


# -- HPT, section 8


def test_hpt_by_hand():
    """Two prompts.

    One solved in part: sums over 3 and 1 tokens, mean over 2 rollouts; one failed: mean of 0.2,
    0.3, 0.4. Each weighs half.
    """
    method = make_method("hpt", {})
    out = look(method, batch(groups=[rollouts((1, 0), demo=DEMO), wrong(1)]))
    assert out.loss == pytest.approx(0.5 * -(3 * A - A) / 2 + 0.5 * 0.3, rel=1e-5)
    np.testing.assert_allclose(out.gradients[0][1:], [-A / 4] * 3, rtol=1e-5)
    np.testing.assert_allclose(by_source(out, Source.EXPERT)[0][1:], [-1 / 6] * 3, rtol=1e-6)
    assert method.metrics(0) == {"sft_share": 0.5} and len(out.rows) == 3, (
        "the failed rollouts are gone"
    )


def test_hpt_as_code_by_hand():
    """R - mean, sum over the constant; SFT a token mean of weight 1; entropy a mean over all
    tokens, demonstrations as well.
    """
    method = make_method(
        "hpt", {"as": "code", "sft_coefficient": 0.3, "policy": {"reduction_length": 10}}
    )
    out = look(
        method,
        batch(groups=[rollouts((1, 0), demo=DEMO), wrong(1), wrong(2, [7, 3])]),
        entropy=constant(0.5),
    )
    sft = (0.2 + 0.3 + 0.4 + 0.2 + 0.3) / 5
    assert out.loss == pytest.approx(-(1.5 - 0.5) / 10 + 0.3 * sft - 0.001 * 0.5, rel=1e-4)


@pytest.mark.parametrize(
    "gate, to_sft", [(-1, 0), (0, 1), (1 / 4, 2), (0.3, 2), (2 / 4, 3), (1, 4)]
)
def test_hpt_gate_counts_right_rollouts(gate, to_sft):
    """Section 8(g): #demonstration rows = #{q: solved <= gate}, rollout rows = n times the others;
    -1 never, 1 always.
    """
    groups = [
        aligned(r, None, number=i)
        for i, r in enumerate(([0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]))
    ]
    method = make_method("hpt", {"gate": gate})
    rows = method.rows(batch(groups=groups))
    demos = [row for row in rows if (row.source == Source.EXPERT).any()]
    assert len(demos) == to_sft and len(rows) - len(demos) == 4 * (4 - to_sft)


def test_hpt_keeps_rollouts_of_prompts_without_a_demonstration():
    assert len(make_method("hpt", {"gate": 1.0}).rows(batch(groups=[rollouts((0, 0))]))) == 2


def test_hpt_under_dynamic_sampling_redraws_only_what_neither_branch_can_use():
    method = make_method("hpt", {"policy": "dapo"})
    assert method.accept(wrong()) and method.accept(rollouts((1, 0), demo=DEMO))
    assert not method.accept(rollouts((1, 1), demo=DEMO)) and not method.accept(rollouts((0, 0)))
