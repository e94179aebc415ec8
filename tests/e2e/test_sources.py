"""Runs with several sources of demonstrations."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load
from tandem.launch.run.run import train

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "sources": {"general": {"path": "task:chain", "options": {"numbers": 3, "size": 10}}},
        "experts_per_step": 6,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "method": {"name": "dmt", "special_steps": 1, "share": 0.5},
    "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 128},
    "run": {"name": "a", "steps": 4, "save_model": False},
}
UNSTABLE = ("seconds", "time/", "per_second", "idle", "version")  # engines have no version here


@pytest.fixture
def config(in_tmp):
    (in_tmp / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return lambda *overrides: load("c.yaml", overrides)


def outcome(folder):
    (model,) = (folder / "checkpoints" / "step_4" / "model").glob("*.safetensors")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    steps = []
    for line in lines:
        keys = [key for key in line if not any(word in key for word in UNSTABLE)]
        steps.append({key: line[key] for key in keys})
    return load_file(model), steps


def test_two_sources_go_on_to_the_bit_after_a_resume(config, in_tmp):
    """Both are under way at the checkpoint, one of them in its second epoch soon after."""
    assert train(config()) == 0
    assert train(config("run.name=b", "run.steps=3")) == 0
    assert train(config("run.name=b", "run.resume=true")) == 0
    (ours, our_steps), (theirs, their_steps) = (outcome(in_tmp / "runs" / n) for n in "ab")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [s for s in our_steps if "loss" in s] == [s for s in their_steps if "loss" in s]


def test_a_changed_source_is_another_run_unless_allowed(config, in_tmp):
    assert train(config("run.steps=2")) == 0
    resumed = ["run.resume=true", "run.steps=3"]
    smaller = "data.sources.general.options={numbers: 3, size: 9}"
    with pytest.raises(ConfigError, match=r"data\.sources\.general: the content differs"):
        train(config(*resumed, smaller))
    # a source that the run did not have begins with its first row
    more = "data.sources.more={path: 'task:sort', options: {size: 4}}"
    assert train(config(*resumed, more, "run.resume_changes=[data.sources.more]")) == 0


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["method.general=generel"], ["'generel'", "did you mean 'general'"]),
        (["method={name: sft}", "data.experts=null"], ["data.experts is not set", "general"]),
    ],
)
def test_a_source_that_is_not_there_is_told_before_the_run(overrides, words, config, in_tmp):
    with pytest.raises(ConfigError) as error:
        train(config(*overrides))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert not list((in_tmp / "runs").rglob("metrics.jsonl"))
