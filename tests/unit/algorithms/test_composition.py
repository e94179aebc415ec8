"""Every method without its expert part is its RL parent, and without its RL part its SFT parent, to
the bit (section 16.4 of the methods dossier).

Gradients are compared row by row, by token ids: a method may hand its rows over in any order, and a
row with no part in the loss may be missing.
"""

from dataclasses import replace

import numpy as np
import pytest
from method_cases import (
    BUDGET,
    EXPERTS,
    aligned,
    as_expert,
    by_source,
    constant,
    drive,
    forced,
    ids,
    kind_of,
    look,
    rollouts,
    without_rollouts,
)

from tandem.algorithms.base import Batch
from tandem.algorithms.registry import METHODS, make_method
from tandem.engine.core.types import Prompt, Sampling, Source
from tandem.engine.learner.by_hand import group, trajectory

GROUPS = tuple(
    group(
        [
            trajectory(
                [1, 2], [20 * i + k for k in range(5, 6 + j)], [-1.0] * (1 + j), prompt_id=f"p{i}"
            )
            for j in range(3)
        ],
        r,
        number=i,
    )
    for i, r in enumerate(([1, 0, 0], [0, 0, 0], [1, 1, 0]))
)


def gradients(method, b, **more) -> dict:
    """{token ids: gradient} of the rows that have one."""
    out = look(method, b, ids, **more)
    return {tuple(row.tokens): g for row, g in zip(out.rows, out.gradients, strict=True) if g.any()}


def assert_same(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys() and theirs
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])


DR = {"advantage": "dr_grpo"}
SIGNS = {"advantage": "raw", "objective": "reinforce"}
# method: (options that switch the expert part off, step, the RL parent's policy options)
SAMPLES_ONLY = {
    # section 13(g): S = 0 is RL
    "sft_rl": ({"sft_steps": 0}, 0, {}),
    # section 13(g)
    "static_mix": ({"mu": 0.0}, 0, {}),
    "rl_with_sft": ({"coefficient": 0.0}, 0, {}),
    "alternating": ({"every": 2}, 1, {}),
    # section 1(g)
    "chord_mu": ({"mu": 0.0}, 0, {}),
    "chord_phi": ({"mu": 0.0}, 0, {}),
    "sft_is": ({"mu": 0.0}, 0, {}),
    # section 7(g): no demonstrations, plain Dr.GRPO
    "luffy": ({}, 0, {**DR, "entropy_bonus": 0.01}),
    # section 2(g): the self term; at H = 0 REINFORCE with R = +-1
    "srft": ({"self_scale": 1.0}, 0, SIGNS),
    # section 3(g)
    "prefix_rft": ({"low": 0.0, "high": 0.0}, 0, {}),
    # section 6(g): GRPO + KL
    "uft": ({"p": 0.0}, 0, {"kl": 0.001}),
    # section 8(g)
    "hpt": ({"gate": -1}, 0, {"reduction": "seq_mean_token_sum"}),
    "visurf": ({}, 0, {"reduction": "seq_mean_token_mean"}),
    # section 4(g)
    "relift": ({"buffer": 10**9}, 0, {}),
    # section 5(g)
    "sasr": ({"warmup": 1, "probability": 0.0}, 1, {}),
}


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("sft", "grpo")])
def test_without_experts_a_method_is_its_rl_parent(name):
    if name not in SAMPLES_ONLY:
        pytest.skip("has no RL parent in this file: see the tests of its own")
    options, step, policy = SAMPLES_ONLY[name]
    method, groups = make_method(name, options), GROUPS
    # present, with weight zero
    experts = (
        EXPERTS if name in ("chord_mu", "chord_phi", "sft_is", "static_mix", "rl_with_sft") else ()
    )
    more = {}
    if name == "srft":
        groups, more = (
            tuple(
                replace(g, rewards=np.where(g.rewards > 0, 1, -1).astype(np.float32))
                for g in GROUPS
            ),
            {"entropy": constant(0.0)},
        )
    if name == "sasr":
        method.observe(0, {"loss/expert": 1.0, "grad_norm": 1.0})
        assert method.demand(step, BUDGET, {}).experts == 0
    if name == "alternating":
        assert method.demand(step, BUDGET, {}).experts == 0
    if name in ("prefix_rft", "uft"):
        prompt = Prompt("p", np.array([1], np.int32), "", {}, np.arange(5, 15, dtype=np.int32))
        assert not any(
            method.request(i, prompt, Sampling(8), 0, BUDGET).prefixes for i in range(50)
        )
    parent = make_method("grpo", {"policy": policy})
    assert_same(
        gradients(method, Batch(step, groups, experts), **more),
        gradients(parent, Batch(step, groups, ()), **more),
    )


def test_relift_with_an_endless_buffer_is_rl_step_for_step():
    """Section 4(g)."""
    ours, _ = drive(make_method("relift", {"buffer": 10**9}), range(12))
    theirs, _ = drive(make_method("grpo", {}), range(12))
    assert all(kind_of(demand) == "rl" for demand, *_ in ours)
    for (_, _, loss, gs, _), (_, _, loss_, gs_, _) in zip(ours, theirs, strict=True):
        assert loss == loss_ and all(np.array_equal(a, b) for a, b in zip(gs, gs_, strict=True))


# methods with an expert stream: options that leave only it, step, weight on its gradient as a
# function of p
STREAM = {
    "sft_rl": ({"sft_steps": 1}, 0, None),
    "static_mix": ({"mu": 1.0}, 0, None),  # section 13(g)
    "rl_with_sft": ({}, 0, None),
    "alternating": ({}, 0, None),
    "chord_mu": ({"mu": 1.0}, 0, None),  # section 1(g)
    "sasr": ({}, 0, None),
    # the SFT parent, token by token times its weight
    "chord_phi": ({"mu": 1.0}, 0, lambda p: p * (1 - p)),
    "sft_is": ({"mu": 1.0}, 0, lambda p: p),
}


@pytest.mark.parametrize("name", STREAM)
def test_without_rollouts_a_method_is_its_sft_parent(name):
    options, step, weight = STREAM[name]
    # present, with weight zero
    groups = GROUPS if name in ("static_mix", "chord_mu", "chord_phi", "sft_is") else ()
    ours = gradients(make_method(name, options), Batch(step, groups, EXPERTS))
    parent = look(make_method("sft", {}), Batch(step, (), EXPERTS), ids)
    if weight is None:
        assert_same(
            ours, {tuple(r.tokens): g for r, g in zip(parent.rows, parent.gradients, strict=True)}
        )
        return
    for row, g in zip(parent.rows, parent.gradients, strict=True):
        np.testing.assert_allclose(ours[tuple(row.tokens)], g * weight(np.exp(ids(row))), rtol=1e-5)


DEMOS = tuple(
    rollouts((0, 0), demo=d, demo_reward=1.0, number=i)
    for i, d in enumerate(([5, 6, 3], [9, 3], [4, 4, 4, 4, 3]))
)
SFT_OF_DEMOS = tuple(map(as_expert, DEMOS))


def sft_gradients(reduction="token_mean"):
    method = (
        make_method("sasr", {"sft_reduction": reduction})
        if reduction != "token_mean"
        else make_method("sft", {})
    )
    return gradients(method, Batch(0, (), SFT_OF_DEMOS))


@pytest.mark.parametrize(
    "variant, reduction", [("code", "token_mean"), ("paper", "seq_mean_token_mean")]
)
def test_hpt_below_the_gate_is_sft(variant, reduction):
    """Section 8(g)."""
    method = make_method(
        "hpt",
        {
            "as": variant,
            "gate": 1.0,
            **({"policy": {"reduction_length": 8}} if variant == "code" else {}),
        },
    )
    assert_same(gradients(method, Batch(0, DEMOS, ())), sft_gradients(reduction))


@pytest.mark.parametrize(
    "variant, parent",
    [
        ("code", {"preset": "luffy_code", "reduction_length": 8}),
        ("paper", {"reduction": "seq_mean_token_sum"}),
    ],
)
def test_hpt_with_every_prompt_above_the_gate_is_rl(variant, parent):
    """Section 8(g): with demonstrations at hand, gate -1 also where all rollouts failed, gate 0
    where one was right.
    """
    failed, solved = aligned([0, 0, 0, 0], 1.0), aligned([0, 1, 0, 0], 1.0, number=1)
    for gate, groups in ((-1, (failed, solved)), (0, (solved,))):
        method = make_method(
            "hpt",
            {
                "as": variant,
                "gate": gate,
                **({"policy": {"reduction_length": 8}} if variant == "code" else {}),
            },
        )
        assert_same(
            gradients(method, Batch(0, groups, ())),
            gradients(make_method("grpo", {"policy": parent}), Batch(0, groups, ())),
        )


def test_reft_without_its_warm_up_is_ppo():
    """Section 10: the same critic, to the bit; sft_steps 0."""
    critic = {"lam": 0.95, "kl": 0.01, "coefficient": 5.0}
    ours, theirs = (
        look(
            make_method(name, options), Batch(0, GROUPS, ()), ids, value=lambda row: 0.1 * ids(row)
        )
        for name, options in (
            ("reft", {"sft_steps": 0}),
            ("ppo", {"policy": {"reduction": "seq_mean_token_mean", "critic": critic}}),
        )
    )
    assert ours.loss == theirs.loss and any(g.any() for g in ours.gradients)
    for a, b in zip(
        ours.gradients + ours.value_gradients,
        theirs.gradients + theirs.value_gradients,
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_relifts_sft_step_without_entropy_is_sft():
    method = make_method("relift", {"buffer": 3, "alpha": 0.0})
    look(method, Batch(0, DEMOS, ()), ids)
    assert_same(gradients(method, Batch(1, (), ())), sft_gradients())


def test_srft_of_demonstrations_alone_is_sft_at_zero_entropy():
    alone = tuple(without_rollouts(g.prompt.demonstration, 1.0, g.group) for g in DEMOS)
    assert_same(
        gradients(
            make_method("srft", {"sft_scale": 1.0}), Batch(0, alone, ()), entropy=constant(0.0)
        ),
        sft_gradients(),
    )


@pytest.mark.parametrize(
    "name, weight",
    [("luffy", lambda p: 0.1 * p / (p + 0.1) ** 2), ("visurf", lambda p: np.ones_like(p))],
)
def test_in_a_group_the_demonstration_has_the_weighted_gradient_of_sft(name, weight):
    """Sections 7(g) and 9(g): A_demo times the token's weight, over a denominator shared with the
    rollouts (here 12 + 10 tokens).
    """
    out = look(
        make_method(name, {"policy": {"reduction": "token_mean", "advantage": "dr_grpo"}}),
        Batch(0, DEMOS, ()),
        ids,
    )
    assert out.denominators["policy"] == 22.0
    sft = sft_gradients()
    rows = {
        tuple(r.tokens): (r, g)
        for r, g in zip(out.rows, out.gradients, strict=True)
        if (r.source == Source.EXPERT).any()
    }
    assert rows.keys() == sft.keys()
    for key, (row, g) in rows.items():
        np.testing.assert_allclose(
            g, (1 - 1 / 3) * weight(np.exp(ids(row))) * sft[key] * 10 / 22, rtol=1e-5
        )


def test_ufts_hint_is_sft_of_the_hint_times_its_coefficient():
    """Section 6(g): with equal rewards GRPO is silent; at the reference so is the KL."""
    g = rollouts((0, 0), demo=[9, 8, 4, 3])
    g = replace(
        g,
        trajectories=tuple(
            forced(t, [9, 8], [5 + i], Source.HINT) for i, t in enumerate(g.trajectories)
        ),
    )
    out = look(
        make_method("uft", {"hint_coefficient": 0.5}), Batch(0, (g,), ()), ids, reference=ids
    )
    sft = look(make_method("sft", {}), Batch(0, (), (trajectory([1], [9, 8], expert=True),)), ids)
    np.testing.assert_array_equal(
        by_source(out, Source.HINT)[0][:3], np.float32(0.5) * sft.gradients[0]
    )
