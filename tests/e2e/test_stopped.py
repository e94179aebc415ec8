"""A step that a signal ends in the middle is done anew by the resumed run: both together equal an
uninterrupted run to the bit.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tandem.launch.check_config import load
from tandem.launch.run.run import train

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "experts_per_step": 6,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 4, "max_tokens": 6},
    "reward": {"functions": [f"{Path(__file__).parent / 'stopping_reward.py'}:score"]},
    "learner": {"learning_rate": 1e-3},
    "run": {"steps": 4, "save_model": False},
}
DYNAMIC = {"name": "grpo", "policy": {"dynamic_sampling": True}}
CLOCKS = ("seconds", "time/", "per_second", "idle")


def run(name: str, *overrides: str) -> int:
    return train(load("c.yaml", [f"run.name={name}", *overrides]))


def lines(path: Path) -> list[dict]:
    """The lines of a file without what a clock says."""
    kept = []
    for line in path.read_text().splitlines():
        values = json.loads(line)
        kept.append(
            {key: value for key, value in values.items() if not any(word in key for word in CLOCKS)}
        )
    return kept


@pytest.mark.parametrize(
    "method, staleness, stop_at, done",
    [
        (DYNAMIC, 0, 5, 0),  # in the first step, of which one group is scored
        (DYNAMIC, 0, 14, 0),  # after a group was filtered and another drawn for it
        (DYNAMIC, 1, 20, 0),  # with the rollouts of the next step on their way
        ({"name": "chord_mu"}, 0, 20, 1),  # with demonstrations
    ],
)
def test_an_abandoned_step_is_as_if_never_begun(in_tmp, capsys, method, staleness, stop_at, done):
    Path("c.yaml").write_text(yaml.safe_dump({**CONFIG, "method": method}))
    assert run("whole", f"rollout.staleness={staleness}") == 0
    Path("stop_at").write_text(str(stop_at))
    assert run("parts", f"rollout.staleness={staleness}") == 75
    out = capsys.readouterr().out
    assert "left what was begun" in out and f"after {done} steps" in out
    assert run("parts", f"rollout.staleness={staleness}", "run.resume=true") == 0

    whole, parts = Path("runs/whole"), Path("runs/parts")
    assert lines(whole / "metrics.jsonl") == lines(parts / "metrics.jsonl")
    assert lines(whole / "rollouts.jsonl") == lines(parts / "rollouts.jsonl")
    (ours,) = (parts / "checkpoints" / "step_4" / "model").glob("*.safetensors")
    (theirs,) = (whole / "checkpoints" / "step_4" / "model").glob("*.safetensors")
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
