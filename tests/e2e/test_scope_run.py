"""Runs whose scope is not the whole model, in one process."""

import json
from pathlib import Path

import pytest

from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load
from tandem.launch.run.run import train

pytestmark = pytest.mark.whole_run
CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
REWARD = Path(__file__).parent / "short_reward.py"
SMALL = [
    "mode=inline",
    "rollout.prompts_per_step=3",
    "rollout.samples_per_prompt=3",
    "rollout.max_tokens=6",
    "data.evaluation=null",
    "data.experts_per_step=4",
    "run.checkpoint_every=2",
    f"reward.functions=[{REWARD}:score]",
]


def run(folder, name, *words, steps=4):
    words = [*SMALL, f"run.dir={folder}", f"run.steps={steps}", "run.name=run", *words]
    return train(load(CONFIGS / f"{name}.yaml", words))


def gaps(folder):
    lines = (folder / "run" / "events.jsonl").read_text().splitlines()
    events = map(json.loads, lines)
    return [event["max_gap"] for event in events if event["kind"] == "gate"]


def weights(folder):
    (path,) = (folder / "run" / "model").glob("*.safetensors")
    return path.read_bytes()


def test_lora_grpo_syncs_merged_weights_and_resumes_exactly(tmp_path):
    """The sampler has the merged weights, the learner W and the adapters: the gate compares both at
    every step.
    """
    kl = "method.policy={kl: 0.01}"  # against the base, by the adapters switched off
    words = ["sync.gate_steps=4", "scope.export=adapter", kl]
    assert run(tmp_path / "straight", "grpo_lora", *words) == 0
    found = gaps(tmp_path / "straight")
    assert len(found) == 4 and max(found) < 1e-4
    assert run(tmp_path / "broken", "grpo_lora", *words, steps=2) == 0
    assert run(tmp_path / "broken", "grpo_lora", *words, "run.resume=true") == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")
    with pytest.raises(ConfigError, match=r"scope\.rank: 16 -> 8"):
        run(tmp_path / "broken", "grpo_lora", *words, "run.resume=true", "scope.rank=8", steps=5)
    merged = ["sync.gate_steps=4", kl, "run.resume=true"]
    assert run(tmp_path / "broken", "grpo_lora", *merged, steps=5) == 0
    assert (tmp_path / "broken" / "run" / "model" / "config.json").is_file()


def test_half_fine_tuning_resumes_in_the_middle_of_a_round(tmp_path):
    assert run(tmp_path / "straight", "sft_half", "scope.every=3") == 0
    assert run(tmp_path / "broken", "sft_half", "scope.every=3", steps=2) == 0
    assert run(tmp_path / "broken", "sft_half", "scope.every=3", "run.resume=true") == 0
    assert weights(tmp_path / "broken") == weights(tmp_path / "straight")


@pytest.mark.parametrize(
    "name, words, message",
    [
        ("grpo_lora", ["scope.dropout=0.1"], "trains on rollouts, which are sampled without it"),
        ("grpo", ["scope.rank=8"], "only scope.kind=lora reads, but scope.kind is full"),
        ("grpo", ["scope.kind=layers"], "scope.train names none"),
        ("sft_half", ["scope.export=adapter"], "only scope.kind=lora reads"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(name, words, message):
    with pytest.raises(ConfigError, match=message):
        load(CONFIGS / f"{name}.yaml", words)
