"""What a method does when nothing is set is what its paper did: the numbers of the methods dossier,
sections 1 to 13, (a) and (b).
"""

import pytest

from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.registry import METHODS, make_method


def always(x):
    return Schedule("constant", peak=x)


PUBLISHED = {
    "chord_mu": {"mu": Schedule("cosine", peak=0.9, valley=0.05, decay=200), "token_weight": "one"},
    "chord_phi": {"mu": always(0.1), "token_weight": "phi"},
    "sft_is": {"token_weight": "p"},
    "psft": {"updates": 8, "clip_low": 0.2, "clip_high": 0.28},
    "static_mix": {"token_weight": "one"},
    "rl_with_sft": {"coefficient": always(1.0)},
    "alternating": {"every": 8, "separate_moments": True},
    "srft": {"sft_scale": always(0.5), "self_scale": always(0.1), "sign": -1.0},
    "prefix_rft": {"high": always(0.95), "keep": 0.2},
    "relift": {"buffer": 128, "entropy_weight": always(1e-4)},
    "uft": {
        "hint_p": Schedule("cosine", peak=0.95, valley=0.05, decay=300),
        "hint_steps": 300,
        "segments": 5,
        "hint_coefficient": always(0.001),
    },
    "luffy": {"gamma": 0.1},
    "hpt": {"gate": 0.0, "sft_coefficient": always(1.0)},
    "visurf": {"smoothing": True},
    "ift": {"variant": "code", "lam": 0.2, "gamma": 0.95, "detach": False},
    "carft": {"contrast": 0.1, "tau": 0.2, "cap": 0.9, "embedding": 64},
}
NO_REGULARISER = {"kl": always(0.0), "entropy_bonus": always(0.0)}
GRPO = {
    "advantage": "grpo",
    "objective": "ppo",
    "reduction": "token_mean",
    "clip_low": 0.2,
    "clip_high": 0.2,
    **NO_REGULARISER,
}
RL_HALVES = {  # what is not said is GRPO's
    "luffy": {"advantage": "dr_grpo", "entropy_bonus": always(0.01)},
    "hpt": {"reduction": "seq_mean_token_sum"},
    "uft": {"kl": always(0.001)},
    "visurf": {"reduction": "seq_mean_token_mean"},
    "ppo": {"advantage": "gae"},
    "reft": {"advantage": "gae", "reduction": "seq_mean_token_mean"},
    "carft": {"advantage": "gae", "reduction": "seq_mean_token_mean"},
}
CRITICS = {  # gamma, lam, KL in the reward, coefficient, value clip: sections 10(a), 11(a)
    "reft": (1.0, 0.95, always(0.01), 5.0, 0.2),
    "carft": (1.0, 0.95, always(0.05), 5.0, 0.2),
    "ppo": (1.0, 1.0, always(0.0), 1.0, 0.2),
}


@pytest.mark.parametrize("name", METHODS)
def test_defaults_are_the_published_ones(name):
    method = make_method(name, {})
    assert {option: getattr(method, option) for option in PUBLISHED.get(name, {})} == PUBLISHED.get(
        name, {}
    )
    if method.policy is not None:
        expected = {**GRPO, **RL_HALVES.get(name, {})}
        assert {option: getattr(method.policy, option) for option in expected} == expected
    if method.critic:
        c = method.policy.critic
        assert (c.gamma, c.lam, c.kl, c.coefficient, c.clip) == CRITICS[name]


@pytest.mark.parametrize("name, alpha", [("luffy", None), ("hpt", None), ("relift", 1e-3)])
def test_defaults_of_the_authors_code(name, alpha):
    """Sections 4(c), 7(c), 8(c): no std, no clip, sum over the response limit, entropy 0.001."""
    method = make_method(name, {"as": "code", "policy": {"reduction_length": 8192}})
    p, unbounded = method.policy, float("inf")
    assert (
        p.advantage,
        p.reduction,
        p.reduction_length,
        p.clip_low,
        p.clip_high,
        p.kl,
        p.entropy_bonus,
    ) == ("dr_grpo", "constant", 8192, unbounded, unbounded, always(0.0), always(0.001))
    assert alpha is None or method.entropy_weight == always(alpha)
