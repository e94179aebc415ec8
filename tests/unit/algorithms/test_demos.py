"""The SFT half of a method, `demos:`: every objective in every method that takes one, and the
options.
"""

import inspect
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import yaml
from method_cases import EXPERTS, aligned, batch, by_source, constant, half, ids, look

from tandem.algorithms.base import Batch, Method
from tandem.algorithms.parts.demos import OBJECTIVES, DemoLoss
from tandem.algorithms.registry import METHODS, is_option, make_method, method_class
from tandem.algorithms.sft.sft import SFT
from tandem.engine.config.options import build
from tandem.engine.core.types import Source
from tandem.launch.check_config import load
from tandem.launch.run.run import train

# {objective: options with which it is -log p}
NEUTRAL = {
    "nll": {},
    "power": {"alpha": 0.0},
    "thresholded": {"threshold": 0.0, "alpha": 0.0},
    "iw_sft": {"low": 1.0, "high": 1.0},
    "talr": {"tau": math.inf},
    "cleaned": {"share": 1.0},
    "entropy_nll": {"scale": 1.0, "sign": 0.0},
}
# {method with an SFT half: (options, step) with which it trains EXPERTS by that alone}
SFT_ALONE = {
    "sft": ({}, 0),
    "chord_mu": ({"mu": 1.0}, 0),
    "static_mix": ({"mu": 1.0}, 0),
    "rl_with_sft": ({}, 0),
    "alternating": ({}, 0),
    "sft_rl": ({}, 0),
    "reft": ({}, 0),
    "sasr": ({}, 0),
}
# and what is RL alone
TAKES_NONE = ("luffy", "srft", "visurf", "prefix_rft", "carft", "ift", "psft")
MIXED_THEN_SFT = {"kind": "periodic", "peak": 0.5, "valley": 1.0, "period": 2}


def demos(objective, **options):
    return {"objective": objective, "options": options}


@dataclass
class Mine(Method):
    uses_experts: ClassVar[bool] = True
    demos: DemoLoss = DemoLoss()

    def rows(self, batch):
        return [self.demos.row(t, "expert") for t in batch.experts]

    def terms(self, batch):
        return self.demos.terms("expert", batch, 2.0)


def sft_batch():
    return Batch(0, (), EXPERTS)


def expert_gradients(name, options, **more):
    """{token ids: gradient} of the demonstrations' rows."""
    found, step = SFT_ALONE.get(name, ({}, 0))
    out = look(make_method(name, {**found, **options}), Batch(step, (), EXPERTS), ids, **more)
    return {tuple(row.tokens): g for row, g in zip(out.rows, out.gradients, strict=True)}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys() and theirs
    for key in theirs:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize("objective", NEUTRAL)
@pytest.mark.parametrize("name", ["sft", "chord_mu", "rl_with_sft", "hpt", "uft", "sasr"])
def test_a_neutral_objective_is_the_method_itself(name, objective):
    """To the bit, beside an RL half."""
    groups = [aligned([0, 1, 0, 1], 1.0), aligned([0, 0, 0, 0], 1.0, number=1)]
    b = batch(groups=groups if name != "sft" else ())
    ours = look(make_method(name, {"demos": demos(objective, **NEUTRAL[objective])}), b, ids)
    parent = look(make_method(name, {}), b, ids)
    assert ours.loss == parent.loss and parent.rows
    for a, c in zip(ours.gradients, parent.gradients, strict=True):
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("name", ["sft", "chord_mu", "rl_with_sft"])
def test_before_the_first_update_proximal_pushes_as_the_method_itself(name):
    """Row 9: to the bit; afterwards a token above 1 + clip_high is left alone."""
    parent = expert_gradients(name, {})
    assert_same(expert_gradients(name, {"demos": "proximal"}), parent)

    def old(row):
        return ids(row) - np.float32(math.log(1.3))

    later = expert_gradients(name, {"demos": "proximal"}, old=old)
    assert not any(g.any() for g in later.values())
    wide = demos("proximal", clip_high=0.5)
    for key, g in expert_gradients(name, {"demos": wide}, old=old).items():
        np.testing.assert_allclose(g, 1.3 * parent[key], rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", [name for name in SFT_ALONE if name != "sft"])
def test_a_hybrids_sft_half_is_sft_with_that_objective(name, objective):
    options = {"demos": demos(objective)}
    assert_same(expert_gradients(name, options), expert_gradients("sft", options))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "policy", ["reinforce_pp", "gspo", "rloo", {"kl": 0.1, "entropy_bonus": 0.1}]
)
def test_the_rl_half_stays_as_it_is(policy, objective):
    """Gradients to the bit; losses but for the order of the sum, since masks change packing."""
    ours, parent = [
        look(make_method("chord_mu", {"mu": 0.3, "policy": policy, **option}), batch(), ids)
        for option in ({"demos": objective}, {})
    ]
    pairs = zip(by_source(ours, Source.POLICY), by_source(parent, Source.POLICY), strict=True)
    assert all(np.array_equal(a, c) for a, c in pairs)
    for name in parent.terms.keys() - {"expert"}:
        assert ours.terms[name] == pytest.approx(parent.terms[name], rel=1e-6)


def test_a_method_of_ones_own_takes_the_same_options():
    ours, theirs = [
        look(build(cls, {"demos": "talr"}, "method"), sft_batch(), ids) for cls in (Mine, SFT)
    ]
    assert ours.loss == 2 * theirs.loss != 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["sft", "chord_mu"])
def test_no_packing_changes_an_objective(name, objective):
    options = {"demos": {"objective": objective, "entropy_bonus": 0.1}}
    b = Batch(0, batch().groups if name != "sft" else (), EXPERTS)
    whole = look(make_method(name, options), b, ids)
    for more in ({"micro_batch_tokens": 6}, {"ranks": 2}):
        split = look(make_method(name, options), b, ids, **more)
        assert split.loss == pytest.approx(whole.loss, rel=1e-6)
        for a, c in zip(split.gradients, whole.gradients, strict=True):
            np.testing.assert_allclose(a, c, rtol=1e-6, atol=1e-9)


def test_chord_weighs_the_objective():
    """CHORD's phi times the objective: p (1 - p) p^alpha; its p of DFT is p^2."""
    plain = expert_gradients("sft", {})
    cases = [
        ("chord_phi", demos("power", alpha=2.0), lambda p: p**3 * (1 - p)),
        ("sft_is", "dft", lambda p: p**2),
        ("chord_phi", demos("iw_sft", low=3.0, high=3.0), lambda p: 3 * p * (1 - p)),
    ]
    for name, option, weight in cases:
        ours = expert_gradients(name, {"mu": 1.0, "demos": option})
        for key, g in plain.items():
            p = np.exp(-0.05 * (1 + np.array(key) % 7) - 0.01 * np.arange(len(key)))
            np.testing.assert_allclose(ours[key], g * weight(p), rtol=1e-5)


def test_chord_with_dft_by_hand():
    """p = 1/2 on five tokens: mu (1/2 log 2), and a push of mu/10 each."""
    out = look(make_method("chord_mu", {"mu": 0.25, "demos": "dft"}), batch(), half)
    assert out.terms["expert"] == pytest.approx(0.5 * math.log(2))
    for g in by_source(out, Source.EXPERT):
        assert set(np.round(g, 6)) == {0.0, np.float32(-0.025)}


def test_reduction_and_entropy_bonus():
    options = {"reduction": "seq_mean_token_sum", "entropy_bonus": 0.1}
    method = make_method("rl_with_sft", {"coefficient": 0.5, "demos": options})
    out = look(method, sft_batch(), half, entropy=constant(2.0))
    assert out.denominators == {"policy": 1.0, "expert": 2.0, "expert_entropy": 2.0}
    assert out.coefficients["expert_entropy"] == pytest.approx(0.05)
    assert out.loss == pytest.approx(0.5 * (5 / 2) * math.log(2) - 0.05 * (5 / 2) * 2.0)


def test_relifts_entropy_bonus_is_alpha_unless_demos_say_otherwise():
    for options, bonus in (({}, 1e-4), ({"demos": {"entropy_bonus": 0.2}}, 0.2)):
        method = make_method("relift", {"buffer": 1, **options})
        method.rows(Batch(0, (aligned([0, 0, 0, 0], 1.0),), ()))
        out = look(method, Batch(1, (), ()), half)
        assert out.coefficients["buffer_entropy"] == pytest.approx(bonus)


# options, and a run


@pytest.mark.parametrize(
    "value, words",
    [
        ("dtf", ["method.demos.objective is 'dtf'", "did you mean 'dft'?", "iw_sft"]),
        (3, ["method.demos: found 3"]),
        ({"objectiv": "dft"}, ["method.demos has no option 'objectiv'", "'objective'?"]),
        (demos("power", alhpa=2), ["objective 'power' has no option 'alhpa'", "'alpha'?"]),
        (demos("power", alpha="big"), ["method.demos.options.alpha", "'big'", "number"]),
        (demos("power", alpha=-1), ["power: alpha is -1", "at least 0"]),
        (demos("nll", weight="q"), ["nll: weight is 'q'", "one, p, phi"]),
        (demos("thresholded", keep="topp"), ["keep is 'topp'", "did you mean 'top'?"]),
        (demos("thresholded", threshold=2), ["threshold is 2", "within [0, 1]"]),
        (demos("iw_sft", level="tokens"), ["level is 'tokens'", "did you mean 'token'?"]),
        (demos("talr", tau=0), ["tau is 0", "above 0"]),
        (demos("talr", floor=2), ["floor is 2", "[0, 1]"]),
        (demos("cleaned", share=0), ["share is 0", "(0, 1]"]),
        (demos("entropy_nll", level="row"), ["level is 'row'"]),
        ({"reduction": "token_meen"}, ["method.demos.reduction", "did you mean 'token_mean'?"]),
        ({"reduction_length": 8}, ["method.demos.reduction_length is 8"]),
        ({"entropy_bonus": "much"}, ["method.demos.entropy_bonus", "'much'"]),
    ],
)
def test_errors_name_the_key(value, words):
    with pytest.raises(ValueError) as error:
        make_method("sft", {"demos": value})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_demos_or_says_why_not(name):
    if is_option(method_class(name), "demos"):
        assert make_method(name, {"demos": "dft"}).demos == DemoLoss("dft")
        assert name not in TAKES_NONE
        return
    with pytest.raises(ValueError) as error:
        make_method(name, {"demos": "dft"})
    trains = method_class(name).uses_experts
    reason = "own formula" if trains else "trains no demonstrations"
    assert reason in str(error.value) and "chord_mu" in str(error.value)
    assert "`demos`" in inspect.getmodule(method_class(name)).__doc__ or not trains


@pytest.mark.whole_run
@pytest.mark.parametrize("objective", ["iw_sft", "talr", "cleaned"])
def test_a_run_fills_in_what_an_objective_asks_for(tmp_path, objective):
    """Steps with rollouts and steps without; in the first one iw_sft is plain SFT."""
    small = {"digits": 3}
    losses = {}
    for name in ("nll", objective):
        config = {
            "mode": "inline",
            "model": {"path": "tandem:tiny"},
            "reward": {"functions": ["exact"]},
            "learner": {"learning_rate": 1e-3},
            "data": {
                "prompts": {"path": "task:sort", "options": small},
                "experts": {"path": "task:sort", "options": {**small, "size": 8}},
                "experts_per_step": 4,
                "max_prompt_tokens": 32,
                "max_expert_tokens": 16,
            },
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 5},
            "run": {"steps": 2, "save_model": False, "dir": str(tmp_path / name)},
            "method": {"name": "chord_mu", "demos": name, "mu": MIXED_THEN_SFT},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        assert train(load(tmp_path / "c.yaml")) == 0
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss/expert"] for line in lines]
    assert len(losses[objective]) == len(losses["nll"]) == 2
    first, plain = losses[objective][0], losses["nll"][0]
    if objective == "iw_sft":
        assert first == pytest.approx(plain, rel=1e-4)
        assert losses[objective][1] != losses["nll"][1]
    elif objective == "talr":
        assert 0 < first < 0.9 * plain
    else:
        assert 0 < first != plain
