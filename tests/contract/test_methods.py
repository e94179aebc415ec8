"""What every method must do, whatever it optimises: be finite on degenerate batches, not depend on
order or packing, survive a resume, draw by (seed, step).
"""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from method_cases import (
    BUDGET,
    EXPERTS,
    aligned,
    batch,
    drive,
    forced,
    ids,
    kind_of,
    look,
    rollouts,
    without_rollouts,
)

from tandem.algorithms.registry import METHODS, make_method
from tandem.engine.core.types import Finish, Source
from tandem.engine.learner.inspect import group, trajectory

# Options that make much happen within a few steps; every method is also tested with none.
LIVELY = {
    "sft": {"demos": {"objective": "talr", "entropy_bonus": 0.01}},
    "sft_rl": {"sft_steps": 7},
    "dmt": {"special_steps": 7, "share": 0.2, "demos": "proximal"},
    "mupas": {"demos": {"reduction": "seq_mean_token_mean", "entropy_bonus": 0.01}},
    "alternating": {"every": 3},
    "sasr": {"warmup": 3, "demos": "iw_sft"},
    "relift": {"buffer": 3},
    "hpt": {"gate": 0.25, "demos": {"objective": "thresholded"}},
    "chord_mu": {"mu": {"kind": "reward_gap", "peak": 0.5}},
    "static_mix": {"policy": "dapo"},
    "chord_phi": {"mu": {"kind": "cosine", "peak": 0.9, "warmup": 3, "decay": 6}},
    "prefix_rft": {
        "low": {"kind": "reward_gap", "peak": 0.8},
        "policy": {"kl": 0.1, "entropy_bonus": 0.01},
    },
    "uft": {"p": {"kind": "gate", "peak": 0.9, "valley": 0.2, "threshold": 0.1}, "hint_steps": 9},
    "luffy": {"as": "code", "policy": {"reduction_length": 16}},
    "srft": {"as": "code", "self_scale": {"kind": "entropy_exp", "peak": 0.1}},
    "visurf": {"policy": {"kl": 0.1}},
    "rl_with_sft": {"coefficient": {"kind": "linear", "peak": 1.0, "decay": 10}},
    "grpo": {"policy": {"kl": {"kind": "linear", "peak": 0.1, "decay": 8}}},
    "sft_is": {"mu": {"kind": "periodic", "peak": 1.0, "period": 4}},
    "dpo": {"pairs": "rollouts", "loss": "ipo"},
    "kto": {"pairs": "rollouts", "good": 0.5},
    "orpo": {"pairs": "rollouts"},
    "spin": {"round_steps": 3, "beta": {"kind": "linear", "peak": 5.0, "decay": 20}},
}
CASES = [(name, {}) for name in METHODS] + list(LIVELY.items())
IDS = [*METHODS, *(f"{name}-lively" for name in LIVELY)]
every_method = pytest.mark.parametrize("name, options", CASES, ids=IDS)


def truncated():
    return replace(rollouts((0, 1), demo=[5, 6, 3], demo_reward=1.0, finish=Finish.LENGTH))


def hinted(rewards, number=0):
    """A group with prompt [1] in which both rollouts were given 9 8."""
    g = rollouts(rewards, demo=[9, 8, 4, 3], demo_reward=1.0, number=number)
    return replace(
        g,
        trajectories=tuple(
            forced(t, [9, 8], [5 + i], Source.HINT) for i, t in enumerate(g.trajectories)
        ),
    )


DEGENERATE = {
    "no experts": lambda: batch(experts=()),
    "no rollouts": lambda: batch(groups=()),
    "nothing": lambda: batch(groups=(), experts=()),
    "all right": lambda: batch(groups=[rollouts((1, 1), demo=[5, 6, 3], demo_reward=1.0)]),
    "all wrong": lambda: batch(groups=[rollouts((0, 0), demo=[5, 6, 3], demo_reward=1.0)]),
    "demonstration wrong as well": lambda: batch(
        groups=[rollouts((0, 0), demo=[5, 6, 3], demo_reward=0.0)]
    ),
    "group of one": lambda: batch(groups=[group([trajectory([1], [5, 6])], [1.0])]),
    "group of one and a demonstration": lambda: batch(
        groups=[
            replace(
                group([trajectory([1], [5, 6])], [0.0], demonstration=[7, 3]),
                demonstration_reward=1.0,
            )
        ]
    ),
    "only a demonstration": lambda: batch(groups=[without_rollouts([7, 3], 1.0)]),
    "empty hint": lambda: batch(groups=[rollouts((0, 1), demo=[5, 6, 3])]),
    "hints": lambda: batch(groups=[hinted((0, 1))]),
    "truncated": lambda: batch(groups=[truncated()]),
    "prefix": lambda: batch(
        groups=[aligned([0, 0, 0, 1], 1.0, prefix=True), aligned([1, 1, 1, 1], None, number=1)]
    ),
}


@every_method
@pytest.mark.parametrize("case", DEGENERATE)
def test_losses_and_gradients_are_finite(name, options, case):
    method = make_method(name, options)
    out = look(method, DEGENERATE[case]())
    assert math.isfinite(out.loss) and all(np.isfinite(g).all() for g in out.gradients)
    assert all(math.isfinite(v) for v in method.metrics(0).values())
    if case == "nothing":
        assert out.loss == 0.0 and not out.rows


@every_method
def test_nothing_but_trained_tokens_has_a_gradient(name, options):
    out = look(
        make_method(name, options),
        batch(groups=[aligned([0, 1, 0, 0], 1.0, prefix=True), hinted((0, 1), 1)]),
    )
    for row, g in zip(out.rows, out.gradients, strict=True):
        assert not g[row.source == Source.PROMPT].any() and not g[~row.trained].any()
        shared = [w for w in row.weights.values()]
        assert all(a is b or not np.shares_memory(a, b) for a in shared for b in shared) and len(
            {id(w) for w in shared}
        ) == len(shared), (
            "terms that share one array change together when a method edits one of them"
        )


@every_method
def test_order_and_packing_change_nothing(name, options):
    """Groups, rollouts within a group, and demonstrations in another order, in small micro-batches
    over two ranks: the same terms and gradients.
    """
    groups = [
        aligned([0, 1, 0, 2] if n else [0, 0, 0, 0], 1.0, number=n, prefix=n == 2) for n in range(3)
    ]

    def other_ids(t, n):
        return replace(t, tokens=t.tokens + 20 * n * (t.source == Source.POLICY))

    groups = [
        replace(g, trajectories=tuple(other_ids(t, n) for t in g.trajectories))
        for n, g in enumerate(groups)
    ]
    turned = [
        replace(g, trajectories=g.trajectories[::-1], rewards=g.rewards[::-1]) for g in groups[::-1]
    ]
    whole = look(make_method(name, options), batch(groups=groups), ids)
    split = look(
        make_method(name, options),
        batch(groups=turned, experts=EXPERTS[::-1]),
        ids,
        micro_batch_tokens=12,
        ranks=2,
    )
    assert (
        split.loss == pytest.approx(whole.loss, rel=1e-5, abs=1e-6)
        and split.denominators == whole.denominators
    )
    assert split.terms == {
        term: pytest.approx(value, rel=1e-5, abs=1e-6) for term, value in whole.terms.items()
    }
    theirs = {
        (row.group, *row.tokens): g for row, g in zip(split.rows, split.gradients, strict=True)
    }
    assert len(theirs) == len(split.rows) == len(whole.rows)
    for row, g in zip(whole.rows, whole.gradients, strict=True):
        np.testing.assert_allclose(theirs[(row.group, *row.tokens)], g, rtol=1e-4, atol=1e-7)


def assert_same_steps(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for (demand, rows, loss, gs, signals), (demand_, rows_, loss_, gs_, signals_) in zip(
        ours, theirs, strict=True
    ):
        assert demand == demand_ and loss == loss_ and signals == signals_
        for a, b in zip(rows, rows_, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            assert a.weights.keys() == b.weights.keys() and all(
                np.array_equal(a.weights[k], b.weights[k]) for k in a.weights
            )
        for a, b in zip(gs, gs_, strict=True):
            np.testing.assert_array_equal(a, b)


@every_method
@pytest.mark.parametrize("staleness", [0, 2])
def test_state_survives_a_resume(name, options, staleness):
    """14 steps equal 7, a checkpoint, a new object, and 7 more: demands, requests, rows, losses and
    metrics, to the bit.
    """
    whole, _ = drive(make_method(name, options), range(14), staleness=staleness)
    first = make_method(name, options)
    before, carried = drive(first, range(7), staleness=staleness)
    state, (signals, tickets) = pickle.loads(pickle.dumps((first.state_dict(), carried)))
    second = make_method(name, options)
    second.load_state_dict(state)
    after, _ = drive(second, range(7, 14), signals, staleness=staleness, tickets=tickets)
    assert_same_steps(before + after, whole)


@every_method
@pytest.mark.parametrize("staleness", [0, 2])
def test_demand_only_answers(name, options, staleness):
    """The run asks for steps that it only looks at: however often, and in whatever order, nothing
    that follows changes.
    """
    plain, _ = drive(make_method(name, options), range(10), staleness=staleness)
    probes = (3, 0, 90, 1, 1, -2)
    probed, _ = drive(make_method(name, options), range(10), staleness=staleness, probes=probes)
    assert_same_steps(probed, plain)


@every_method
def test_draws_depend_on_seed_and_step_alone(name, options):
    """Section 5(f)2.

    Two ranks, or two runs with one seed: the same switches and prefixes.
    """
    one, two = make_method(name, options), make_method(name, options)
    np.random.default_rng().random()
    assert_same_steps(drive(one, range(6))[0], drive(two, range(6))[0])


def test_another_seed_draws_another_switch():
    def kinds(seed):
        return [
            kind_of(demand)
            for demand, *_ in drive(
                make_method("sasr", {"warmup": 1}), range(30), budget=replace(BUDGET, seed=seed)
            )[0]
        ]

    assert kinds(1) == kinds(1) != kinds(2) and {"sft", "rl"} == set(kinds(1))


@pytest.mark.parametrize("name", METHODS)
def test_lively_options_cover_what_can_change_over_time(name):
    """The resume test means something only where something changes from step to step."""
    record, _ = drive(make_method(name, LIVELY.get(name, {})), range(14))
    assert (
        len({round(signals["grad_norm"], 6) for *_, signals in record if signals["grad_norm"]}) > 3
    )
    if name in ("sft_rl", "alternating", "sasr", "relift"):
        assert {kind_of(demand) for demand, *_ in record} == {"sft", "rl"}


@pytest.mark.parametrize("name", METHODS)
def test_state_of_another_method_is_refused(name):
    with pytest.raises((ValueError, KeyError)):
        make_method(name, {}).load_state_dict({"nonsense": 1})
