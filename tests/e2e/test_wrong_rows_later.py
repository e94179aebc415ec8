"""A row that could not be checked before the run: it ends with a checkpoint, or goes on without the
row.
"""

from pathlib import Path

import pytest
import yaml

from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load
from tandem.launch.run.run import train

# Row 51 of this endless task is the first with more than 100 tokens: step 6 of 8 rows each meets
# it.
CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "method": {"name": "grpo"},
    "data": {
        "prompts": {"path": "reasoning_gym:chain_sum", "options": {"seed": 0, "max_digits": 4}},
        "max_prompt_tokens": 100,
    },
    "rollout": {"prompts_per_step": 8, "samples_per_prompt": 2, "max_tokens": 2},
    "reward": {"functions": ["exact"]},
    "learner": {"learning_rate": 1e-3},
    "run": {"steps": 8, "save_model": False},
}


def config(folder: Path, *overrides: str):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return load(path, [f"run.dir={folder}", *overrides])


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "run" / "checkpoints").glob("step_*")]


def test_steps_before_a_row_that_is_too_long_are_kept(tmp_path):
    with pytest.raises(ConfigError, match="chain_sum/train/seed0:51: the prompt has 102 tokens"):
        train(config(tmp_path))
    assert checkpoints(tmp_path) == ["step_6"]


def test_with_overlong_drop_the_run_goes_on_without_it(tmp_path):
    assert train(config(tmp_path, "data.overlong=drop")) == 0
    assert checkpoints(tmp_path) == ["step_8"]
    assert "seed0:51" not in (tmp_path / "run" / "rollouts.jsonl").read_text()
