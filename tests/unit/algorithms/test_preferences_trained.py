"""Preferences on a real, tiny model: plain autograd in any packing, and whole runs."""

import json

import pytest
import torch
import yaml
from pair_cases import PAIRS
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from tandem.algorithms.base import Batch
from tandem.algorithms.registry import configured, make_method
from tandem.engine.config.schema import Config, LearnerConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.packing import pack
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.learner.terms import denominators, make_tokens, micro_batch_loss
from tandem.engine.loop.streams import with_streams
from tandem.engine.model.tiny import make_tiny
from tandem.launch.check_config import load
from tandem.launch.run.run import train
from tandem.launch.run.sides import policy_spec

BATCH = Batch(0, (), PAIRS)
METHOD = make_method("dpo", {"beta": 0.5})


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    """A rank whose policy has moved away from its reference."""
    path = str(make_tiny(tmp_path_factory.mktemp("model") / "tiny", hidden=32, layers=2))
    config = Config(
        model=ModelConfig(path=path), learner=LearnerConfig(head_chunk=4), method={"name": "dpo"}
    )
    spec = policy_spec(configured(config.method))
    engine = LocalEngine(build_policy(config, path, spec), config.learner)
    found = LearnerRank(config, path, spec, engine)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters()}


def by_autograd(rank):
    """DPO from whole logits, row after row."""

    def sums(model):
        found = []
        for pair in PAIRS:
            ids = torch.as_tensor(pair.tokens).long()
            logp = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
            of_token = logp.gather(-1, ids[1:, None]).squeeze(-1)
            found.append(of_token[torch.as_tensor(pair.source[1:]) == 2].sum())
        return torch.stack(found)

    policy = rank.engine.module
    policy.zero_grad(set_to_none=True)
    with torch.no_grad():
        reference = sums(rank.models.weights_of("reference").model)
    gain = sums(policy.model) - reference
    loss = -logsigmoid(0.5 * (gain[0::2] - gain[1::2])).mean()
    loss.backward()
    return loss.item(), gradients(policy)


@pytest.mark.parametrize(
    "budget, ranks, share", [(1 << 20, 1, False), (8, 1, False), (8, 2, False), (1 << 20, 1, True)]
)
def test_dpo_equals_plain_autograd_in_any_packing(rank, budget, ranks, share):
    expected_loss, expected = by_autograd(rank)
    terms = METHOD.terms(BATCH)
    rows = with_streams(rank, METHOD.rows(BATCH), terms, 1.0)
    z = denominators(terms, rows)
    policy = rank.engine.module
    policy.zero_grad(set_to_none=True)
    total = 0.0
    for micro_batches in pack(rows, terms, ranks, budget, version=0, share_prompts=share):
        for micro in micro_batches:
            outputs = rank.run_micro_batch(rank.engine.forward, micro, 1.0)
            value, _ = micro_batch_loss(terms, z, micro, make_tokens(micro, outputs))
            value.backward()
            total += value.item()
    assert total == pytest.approx(expected_loss, rel=1e-5)
    for name, grad in gradients(policy).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "experts": {
            "path": "task:pairs",
            "chosen": "answer",
            "rejected": "wrong",
            "options": {"digits": 3, "size": 32},
        },
        "experts_per_step": 32,  # all pairs
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "learner": {"learning_rate": 3e-4, "micro_batch_tokens": 128},
    "run": {"name": "a", "steps": 6, "save_model": False},
}
SELF_PLAY = {
    "method": {"name": "spin", "round_steps": 2, "updates": 2},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "experts_per_step": 3,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "rollout": {"max_tokens": 5},
    "run": {"name": "a", "steps": 4, "save_model": False},
}
UNSTABLE = ("seconds", "time/", "per_second", "idle", "version")  # engines have no version here


@pytest.fixture
def config(in_tmp):
    def write(tree, *overrides):
        (in_tmp / "c.yaml").write_text(yaml.safe_dump({**CONFIG, **tree}))
        return load("c.yaml", overrides)

    return write


def steps(folder):
    found = []
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            found.append({k: v for k, v in line.items() if not any(w in k for w in UNSTABLE)})
    return found


def last_weights(folder, step):
    (model,) = (folder / "checkpoints" / f"step_{step}" / "model").glob("*.safetensors")
    return load_file(model)


@pytest.mark.whole_run
@pytest.mark.parametrize("tree, steps_before", [({"method": {"name": "dpo"}}, 3), (SELF_PLAY, 3)])
def test_a_run_goes_on_to_the_bit_after_a_resume(config, in_tmp, tree, steps_before):
    """DPO raises the margin. Of SPIN the third step is in the middle of a round: its opponent, no
    longer the first model, is part of the checkpoint.
    """
    assert train(config(tree)) == 0
    assert train(config(tree, "run.name=b", f"run.steps={steps_before}")) == 0
    assert train(config(tree, "run.name=b", "run.resume=true")) == 0
    ours, theirs = steps(in_tmp / "runs" / "a"), steps(in_tmp / "runs" / "b")
    assert ours == theirs
    last = len(ours)
    for name, weight in last_weights(in_tmp / "runs" / "a", last).items():
        assert torch.equal(weight, last_weights(in_tmp / "runs" / "b", last)[name])
    if "rollout" not in tree:
        margins = [step["preference/margin"] for step in ours]
        assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > margins[1] > 0
        assert ours[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize(
    "method, overrides, words",
    [
        ("dpo", ["data.experts.chosen=null", "data.experts.rejected=null"], "trains on pairs"),
        ("dpo", ["method.pairs=rollouts"], "trains on rollouts, but data.prompts is not set"),
        ("sft", [], "gives pairs"),
    ],
)
def test_what_a_config_must_give(config, method, overrides, words):
    with pytest.raises(ConfigError, match=words):
        config({"method": {"name": method}}, *overrides)


def test_kto_and_the_implicit_reward_take_other_answers_too(config):
    plain = ["data.experts.chosen=null", "data.experts.rejected=null"]
    for method in ("kto", "implicit_reward"):
        config({"method": {"name": method}}, *plain)
        config({"method": {"name": method}})
