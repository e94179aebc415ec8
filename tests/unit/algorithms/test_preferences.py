"""Methods on pairs and judged answers by hand: DPO and its kin, and rows 21, 65 and 68 of the
catalogue.
"""

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
from method_cases import BUDGET, batch, ids, rollouts
from pair_cases import PAIRS, answer

from tandem.algorithms.base import Demand
from tandem.algorithms.registry import make_method
from tandem.engine.core.errors import ConfigError, MethodError
from tandem.engine.core.types import Prompt, Sampling, Source
from tandem.engine.learner.by_hand import group, trajectory
from tandem.engine.learner.inspect import inspect

SPLITS = [(1 << 20, 1), (12, 1), (1, 1), (12, 2)]


def reference(row):
    return ids(row) - 0.02 * row.tokens


def look(name, options=None, experts=PAIRS, ref=reference, logp=ids, **more):
    method = make_method(name, options or {})
    return inspect(method, batch(groups=(), experts=experts), logp, reference=ref, **more)


def of_rows(function, experts=PAIRS):
    """function(row's log-probs minus the reference's, or themselves) per trajectory."""
    found = []
    for expert in experts:
        trained = expert.source == Source.EXPERT
        found.append(function(expert, trained))
    return np.array(found)


GAINS = of_rows(lambda row, trained: (ids(row) - reference(row))[trained].sum())
MEANS = of_rows(lambda row, trained: ids(row)[trained].mean())
COUNTS = of_rows(lambda row, trained: trained.sum())
CHOSEN, REJECTED = slice(0, None, 2), slice(1, None, 2)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def odds(mean):
    return mean - np.log(1 - np.exp(mean))


h = GAINS[CHOSEN] - GAINS[REJECTED]
per_token = GAINS / COUNTS
FORMULAS = {
    "sigmoid": ("dpo", {"beta": 0.5}, -np.log(sigmoid(0.5 * h))),
    "smoothed": (
        "dpo",
        {"beta": 0.5, "label_smoothing": 0.2},
        -0.8 * np.log(sigmoid(0.5 * h)) - 0.2 * np.log(sigmoid(-0.5 * h)),
    ),
    "ipo": ("dpo", {"loss": "ipo", "beta": 0.25}, (h - 2) ** 2),
    "ipo, means": (
        "dpo",
        {"loss": "ipo", "beta": 0.25, "per_token": True},
        (per_token[CHOSEN] - per_token[REJECTED] - 2) ** 2,
    ),
    "hinge": ("dpo", {"loss": "hinge", "beta": 4.0}, np.maximum(0, 1 - 4 * h)),
    "simpo": (
        "simpo",
        {"beta": 2.5, "gamma": 0.3},
        -np.log(sigmoid(2.5 * (MEANS[CHOSEN] - MEANS[REJECTED]) - 0.3)),
    ),
    "orpo": (
        "orpo",
        {"lam": 0.3},
        -MEANS[CHOSEN] - 0.3 * np.log(sigmoid(odds(MEANS[CHOSEN]) - odds(MEANS[REJECTED]))),
    ),
    "asft": (
        "asft",
        {"lam": 0.3},
        -1.3 * MEANS[CHOSEN] - 0.3 * np.log(1 - np.exp(MEANS[REJECTED])),
    ),
}


@pytest.mark.parametrize("micro_batch_tokens, ranks", SPLITS)
@pytest.mark.parametrize("name, options, expected", FORMULAS.values(), ids=FORMULAS)
def test_pairs_by_hand_in_any_packing(name, options, expected, micro_batch_tokens, ranks):
    """The loss is the formula's mean over pairs, and its gradient that of finite differences."""
    split = {"micro_batch_tokens": micro_batch_tokens, "ranks": ranks}
    out = look(name, options, **split)
    assert out.denominators == {"preference": 2.0}
    assert out.loss == pytest.approx(expected.mean(), rel=1e-5)
    step = 2e-3
    for i, (row, gradient) in enumerate(zip(out.rows, out.gradients, strict=True)):
        found = set(np.round(gradient[row.trained], 7))
        assert len(found) == 1 and not gradient[~row.trained].any()
        first = int(row.trained.argmax())

        def moved(by, number=i, at=first):
            def logp(one):
                values = ids(one).astype(np.float32).copy()
                if one.tokens is out.rows[number].tokens:
                    values[at] += by
                return values

            return look(name, options, logp=logp, **split).loss

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert gradient[first] == pytest.approx(slope, rel=2e-3, abs=5e-4)


def test_what_is_reported_of_pairs():
    out = look("dpo", {"beta": 0.5})
    assert out.metrics["preference/margin"] == pytest.approx(0.5 * h.mean(), rel=1e-5)
    assert out.metrics["preference/accuracy"] == pytest.approx((h > 0).mean())
    assert out.metrics["preference/chosen"] == pytest.approx(0.5 * GAINS[CHOSEN].mean(), rel=1e-5)
    assert look("dpo", ref=ids).metrics["preference/accuracy"] == 0.5, "ties"


@pytest.mark.parametrize(
    "name, options, expected",
    [
        ("dpo", {}, log(2)),
        ("dpo", {"label_smoothing": 0.3}, log(2)),
        ("dpo", {"loss": "ipo", "beta": 0.1}, 25.0),
        ("dpo", {"loss": "hinge"}, 1.0),
        ("kto", {"desirable": 1.5, "undesirable": 0.5}, 0.5),
        ("implicit_reward", {}, 0.25),
    ],
)
def test_at_the_reference_the_loss_is_known(name, options, expected):
    """Rows 65 and 68: log 2, and 1/4 where 1 or 0 is wanted."""
    assert look(name, options, ref=ids).loss == pytest.approx(expected, rel=1e-5)


# -- absolute likelihood (21) and odds


def test_the_two_forms_of_asft_agree_and_lie_above_orpo():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = -3 * rng.random(4)

        def logp(row, values=values):
            number = next(i for i, t in enumerate(PAIRS) if t.tokens is row.tokens)
            return np.full(len(row.tokens), values[number], np.float32)

        better, worse = values[CHOSEN], values[REJECTED]
        judged = np.log(sigmoid(odds(better))) + np.log(sigmoid(-odds(worse)))
        first = -better - 0.5 * judged
        found = look("asft", {"lam": 0.5}, logp=logp).loss
        assert found == pytest.approx(first.mean(), rel=1e-4)
        second = -1.5 * better - 0.5 * np.log(1 - np.exp(worse))
        assert found == pytest.approx(second.mean(), rel=1e-4)
        assert look("orpo", {"lam": 0.5}, logp=logp).loss <= found + 1e-6


@pytest.mark.parametrize("name", ["asft", "orpo"])
@pytest.mark.parametrize("certain", [0.0, -1e-8, -80.0])
def test_certain_answers_are_finite(name, certain):
    out = look(name, logp=lambda row: np.full(len(row.tokens), certain, np.float32))
    assert np.isfinite(out.loss) and all(np.isfinite(g).all() for g in out.gradients)


# -- single answers: KTO, and the implicit reward (65)


def old(row):
    return ids(row) + 0.01 * row.tokens


@pytest.mark.parametrize("micro_batch_tokens, ranks", SPLITS)
def test_kto_by_hand(micro_batch_tokens, ranks):
    """z0: of prompt [1 2] with 8 3, the first answer to [4], and of [4] with the first to [1 2]."""
    options = {"beta": 0.5, "desirable": 1.2, "undesirable": 0.8}
    split = {"micro_batch_tokens": micro_batch_tokens, "ranks": ranks}
    out = look("kto", options, old=old, **split)
    mixed = [answer([1, 2], [8, 3], ""), answer([4], [5, 6, 3], "")]
    gains = of_rows(lambda row, trained: (old(row) - reference(row))[trained].sum(), mixed)
    z0 = gains.mean()
    assert z0 > 0 and out.denominators == {"kto": 4.0, "kl": 1.0}
    good = 1.2 * (1 - sigmoid(0.5 * (GAINS[CHOSEN] - z0)))
    bad = 0.8 * (1 - sigmoid(0.5 * (z0 - GAINS[REJECTED])))
    assert out.loss == pytest.approx((good.sum() + bad.sum()) / 4, rel=1e-5)
    assert out.metrics["kto/z0"] == pytest.approx(0.5 * z0, rel=1e-5)
    for row, gradient in zip(out.rows, out.gradients, strict=True):
        assert (gradient[row.trained] != 0).all() and ("kto" in row.weights or not gradient.any())


def test_kto_without_another_prompt_or_below_the_reference_has_z0_0():
    one = look("kto", {"beta": 0.5}, experts=PAIRS[:2])
    assert len(one.rows) == 2 and one.metrics["kto/z0"] == 0
    below = look("kto", {"beta": 0.5}, old=lambda row: reference(row) - 1)
    assert below.metrics["kto/z0"] == 0


def test_kto_judges_rollouts_by_their_reward():
    method = make_method("kto", {"pairs": "rollouts", "good": 0.5})
    out = inspect(method, batch(groups=[rollouts((0.5, 0.4))], experts=()), ids, reference=ids)
    assert [row.role for row in out.rows] == ["chosen", "rejected"] and out.loss == 0.5
    assert (out.gradients[0][1:] < 0).all() and (out.gradients[1][1:] > 0).all()


def test_the_implicit_reward_is_drawn_to_the_score():
    """Row 65: a demonstration to 1, an answer with a score to that; up iff it is below it."""
    scored = [
        trajectory([4], [8, 3], expert=True),
        replace(trajectory([4], [9, 3], expert=True), columns={"score": 0.5}),
        replace(trajectory([4], [6, 3], expert=True), columns={"score": 0.1}),
        answer([4], [5, 3], "rejected"),
    ]
    for ref in (ids, reference):
        out = look("implicit_reward", {"beta": 2.0}, experts=tuple(scored), ref=ref)
        gains = of_rows(lambda row, trained, r=ref: (ids(row) - r(row))[trained].sum(), scored)
        targets, rewards = np.array([1, 0.5, 0.1, 0]), sigmoid(2.0 * gains)
        assert out.loss == pytest.approx(((rewards - targets) ** 2).mean(), rel=1e-5)
        slopes = 2 * (rewards - targets) * rewards * (1 - rewards) * 2.0 / 4
        for gradient, slope in zip(out.gradients, slopes, strict=True):
            assert gradient[-1] == pytest.approx(slope, rel=1e-4, abs=1e-8)
    with pytest.raises(ConfigError, match="column 'score' is 'good', expected a number from 0"):
        look("implicit_reward", experts=(replace(scored[1], columns={"score": "good"}),))


def targets(options, *answers):
    rows = make_method("implicit_reward", options).rows(batch(groups=(), experts=answers))
    return [float(row.streams["target_reward"][0]) for row in rows]


def test_roles_go_before_a_column_that_nobody_named():
    pair = [replace(one, columns={"score": 0.3}) for one in PAIRS[:2]]
    assert targets({}, *pair) == [1.0, 0.0]
    judged = answer([4], [5, 3], "rejected")
    assert targets({"column": "s"}, replace(judged, columns={"s": 0.25})) == [0.25]


@pytest.mark.parametrize(
    "options, one, words",
    [
        (
            {"column": "scroe"},
            {"columns": {"score": 1.0}},
            "'scroe' .did you mean 'score'.*: score",
        ),
        ({"column": "s"}, {"columns": {"s": 10**400}}, "column 's' is 1000.*expected a number"),
        ({"column": "s"}, {"columns": {"s": 1.0}, "group": 9}, "'s', but .* is half of a pair"),
        ({}, {"role": "good"}, "the role 'good', expected chosen or rejected"),
    ],
)
def test_answers_that_do_not_say_their_score(options, one, words):
    with pytest.raises(ConfigError, match=words):
        targets(options, replace(trajectory([4], [8, 3], expert=True), **one))


def test_poft_learns_less_of_what_aligned_models_find_unlikely():
    """Row 20: level with them the loss is log 2 and the weight 1/2; with low g it goes to 0."""

    def out(*known):
        columns = {f"m{i}": number for i, number in enumerate(known)}
        expert = replace(trajectory([4], [8, 3], expert=True), columns=columns)
        return look("poft", {"models": list(columns)}, experts=(expert,))

    mean = ids(out(-1.0).rows[0])[1:].mean()
    level = out(mean - 0.1, mean + 0.1)
    assert level.loss == pytest.approx(log(2), rel=1e-5)
    assert level.metrics["sft/weight"] == pytest.approx(0.5, rel=1e-5)
    for known in ((-0.3,), (-2.0, -0.1)):
        found, g = out(*known), exp(sum(known) / len(known))
        weight = g / (g + exp(mean))
        assert found.metrics["sft/weight"] == pytest.approx(weight, rel=1e-5)
        np.testing.assert_allclose(found.gradients[0][1:], -weight / 2, rtol=1e-5)
    assert abs(out(-30.0).gradients[0]).max() < 1e-9
    with pytest.raises(ConfigError, match=r"column 'm0' is 1\.0, expected a number from -inf to 0"):
        out(1.0)


# -- where pairs are from


def test_pairs_of_rollouts_are_the_best_and_the_worst():
    one = group(
        [trajectory([1], [k, 3]) for k in (5, 6)] + [trajectory([1], [7]), trajectory([1], [8])],
        [0.2, 0.9, 0.9, 0.2],
        number=3,
    )
    method = make_method("dpo", {"pairs": "rollouts"})
    out = inspect(
        method, batch(groups=[one, rollouts((1, 1), number=4)], experts=()), ids, reference=ids
    )
    found = [(row.tokens.tolist(), row.role, row.group) for row in out.rows]
    assert found == [([1, 7], "chosen", 3), ([1, 8], "rejected", 3)]
    assert method.demand(0, BUDGET, {}) == Demand(prompts=BUDGET.prompts)
    with pytest.raises(ConfigError, match="samples_per_prompt is 1"):
        method.demand(0, replace(BUDGET, samples=1), {})


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_demonstrations_that_are_no_answers_are_refused(name):
    with pytest.raises(MethodError, match=r"the demonstration of prompt .*`chosen` and `rejected`"):
        look(name, experts=(trajectory([1], [5, 3], expert=True),))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("dpo", {"beta": 0}, "beta is 0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("dpo", {"label_smoothing": 0.1, "loss": "ipo"}, "with loss 'ipo'"),
        ("dpo", {"loss": "kto"}, "loss"),
        ("simpo", {"pairs": "demos"}, "pairs"),
        ("spin", {"rounds": 0}, "rounds is 0"),
        ("poft", {"models": []}, "models is empty"),
    ],
)
def test_options_that_cannot_be(name, options, words):
    with pytest.raises(ValueError, match=words):
        make_method(name, options)


# -- SPIN (68)


def spin(options=None, response=(5, 6), demo=(9, 8, 3), **more):
    method = make_method("spin", options or {})
    groups = [group([trajectory([1], response)], [0.0], demonstration=demo, number=7)]
    return inspect(method, batch(groups=groups, experts=()), ids, **more)


def test_spin_at_its_opponent_and_by_hand():
    """Row 68: theta = opponent gives log 2."""
    assert spin(reference=ids).loss == pytest.approx(log(2), rel=1e-6)
    real = 0.02 * (9 + 8 + 3)
    own = 0.02 * (5 + 6)
    out = spin({"beta": 3.0}, reference=reference)
    assert out.loss == pytest.approx(log(1 + exp(-3.0 * (real - own))), rel=1e-4)
    assert [row.role for row in out.rows] == ["chosen", "rejected"]
    hinge = spin({"beta": 3.0, "loss": "hinge"}, reference=reference)
    assert hinge.loss == pytest.approx(1 - 3.0 * (real - own), rel=1e-4)


def test_spin_against_the_demonstration_itself_has_no_gradient():
    """Row 68: y_real = y_gen."""
    out = spin(response=(9, 8, 3), reference=reference)
    np.testing.assert_array_equal(out.gradients[0] + out.gradients[1], np.zeros(4))
    assert out.loss == pytest.approx(log(2), rel=1e-6)


def test_spin_refuses_answers_from_before_the_opponent():
    method = make_method("spin", {"round_steps": 2})
    answers = [trajectory([1], [5, 6], version=3)]
    one = group(answers, [0.0], demonstration=(9, 3), number=7)
    assert len(method.rows(batch(groups=[one], experts=(), step=3))) == 2
    with pytest.raises(
        MethodError, match=r"weights of step 3, expected those of step 4.*staleness"
    ):
        method.rows(batch(groups=[one], experts=(), step=4, off_policy=True))


def test_spin_goes_in_rounds():
    method = make_method("spin", {"round_steps": 2, "rounds": 3, "updates": 5})
    demands = [method.demand(step, BUDGET, {}) for step in range(6)]
    assert [demand.set_reference for demand in demands] == [False, False, True, False, True, False]
    assert [bool(demand.stop) for demand in demands] == [False] * 5 + [True]
    assert all(demand.updates == 5 and demand.prompts == BUDGET.experts for demand in demands)
    assert not make_method("spin", {}).demand(99, BUDGET, {}).stop
    prompt = Prompt("p", np.array([1], np.int32), "", {}, np.array([5, 3], np.int32))
    assert method.request(0, prompt, Sampling(8), 0, BUDGET).samples == 1
    assert method.metrics(3) == {"round": 1.0}
