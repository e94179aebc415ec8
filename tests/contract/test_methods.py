"""What every method must do, whatever it optimises: launch/method_contract/checks.py, which
`tandem check-method` runs too.
"""

from dataclasses import replace
from functools import partial

import pytest
from method_cases import BUDGET, drive, kind_of

from tandem.algorithms.registry import METHODS, make_method
from tandem.launch.method_contract.checks import CHECKS, Subject

# Options that make much happen within a few steps; every method is also tested with none.
LIVELY = {
    "sft": {"demos": {"objective": "talr", "entropy_bonus": 0.01}},
    "sft_rl": {"sft_steps": 7},
    "q_tuning": {"keep_rows": 0.7},
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
    "opd": {
        "rewards": True,
        "clip_d": 0.2,
        "coefficient": {"kind": "linear", "peak": 1.0, "decay": 6},
        "policy": {"kl": 0.1},
    },
    "gkd": {"beta": 0.0, "own": 0.7},
    "sdft": {"form": "sampled", "teacher": "policy", "template": " so {hint}"},
    "sft_is": {"mu": {"kind": "periodic", "peak": 1.0, "period": 4}},
    "dpo": {"pairs": "rollouts", "loss": "ipo"},
    "kto": {"pairs": "rollouts", "good": 0.5},
    "orpo": {"pairs": "rollouts"},
    "spin": {"round_steps": 3, "beta": {"kind": "linear", "peak": 5.0, "decay": 20}},
}
CASES = [(name, {}) for name in METHODS] + list(LIVELY.items())
IDS = [*METHODS, *(f"{name}-lively" for name in LIVELY)]
every_method = pytest.mark.parametrize("name, options", CASES, ids=IDS)


@every_method
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_method_keeps_the_contract(name, options, check):
    assert check(Subject(partial(make_method, name, options))) is None


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
    if name == "ghpo":  # prompts with a hint, of a second wave
        assert any(row.tokens[1] != 2 for _, rows, *_ in record for row in rows)
