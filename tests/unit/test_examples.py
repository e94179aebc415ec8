"""docs/examples: every file there works as it stands."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tandem
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards.runner import RewardRunner

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
TASK = {"path": "task:sort", "options": {"digits": 3}}
SMALL = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "method": {"name": "grpo"},
    "data": {"prompts": TASK, "max_prompt_tokens": 32},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 5},
    "run": {"steps": 1, "save_model": False},
}
REWARD = EXAMPLES / "my_reward.py"
REWARDS = {
    "functions": [f"{REWARD}:in_place", f"{REWARD}:short"],
    "weights": [1.0, 0.1],
    "options": {f"{REWARD}:short": {"limit": 8}},
}


def run_inline(folder: Path, config: dict) -> list[dict]:
    """The lines of metrics.jsonl of a run in `folder`."""
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert tandem.train(tandem.load(folder / "config.yaml", [f"run.dir={folder}"])) == 0
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_my_reward_by_hand():
    """'1243' has two digits of '1234' in place; '1234567890' is longer than 8 characters."""
    config = RewardConfig(
        functions=tuple(REWARDS["functions"]),
        weights=tuple(REWARDS["weights"]),
        options=REWARDS["options"],
    )
    prompt = Prompt("p", np.zeros(1, np.int32), content="", columns={"answer": "1234"})
    texts = ["1234", " 1243 ", "1234567890", ""]
    ids = [np.zeros(len(text), np.int32) for text in texts]
    outcomes = RewardRunner(config, 0, inline=True).submit(prompt, texts, ids).result(timeout=0)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    values = [outcome.value for outcome in outcomes]
    assert values == pytest.approx([1.1, 0.6, 0.4, 0.1])


@pytest.mark.whole_run
def test_a_run_with_my_reward(tmp_path):
    (step,) = run_inline(tmp_path, {**SMALL, "reward": REWARDS})
    assert 0 <= step["reward/mean"] <= 1.1
    assert any("in_place" in key for key in step)


@pytest.mark.whole_run
def test_my_config(tmp_path, monkeypatch):
    """Its base has the model, the data and two steps; method and reward are the files beside it."""
    monkeypatch.chdir(EXAMPLES)
    config = tandem.load("my_config.yaml", [f"run.dir={tmp_path}"])
    assert config.mode == "inline" and config.run.steps == 2 and config.data.experts_per_step == 8
    assert config.method["name"].endswith("my_method.py:FocalMix")
    assert tandem.train(config) == 0
    assert len((tmp_path / "my_config" / "metrics.jsonl").read_text().splitlines()) >= 2
