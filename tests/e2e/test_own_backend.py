"""Runs that roll out with a backend of the user's own, the documented example: in one process, and
on the real stack as engines in Ray actors, its file gone before they start.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_backend.py"
TASK = {"path": "task:sort", "options": {"digits": 3, "size": 16}}
CONFIG = {
    "model": {"path": "tandem:tiny"},
    "method": {"name": "grpo"},
    "data": {"prompts": TASK, "max_prompt_tokens": 32},
    "rollout": {
        "backend": "mine/my_backend.py:GenerateBackend",
        "backend_options": {"rows": 2},
        "prompts_per_step": 2,
        "samples_per_prompt": 4,
        "max_tokens": 6,
    },
    "reward": {
        "functions": ["length"],
        "options": {"length": {"max_tokens": 6, "buffer_tokens": 6}},
    },
    "learner": {"learning_rate": 1e-3},
    # rollout and learner agree to rounding, after every update
    "sync": {"gate_steps": 9, "max_gap": 1e-3},
    "cluster": {"engines": 2, "learner_cpus": 0.5, "engine_cpus": 0.5},
    "run": {"name": "run", "dir": ".", "steps": 3, "save_model": False},
}
RUN = """
import shutil, sys
from tandem.launch.check_config import load
from tandem.launch.run.run import train

config = load("config.yaml", sys.argv[1:])
if config.mode == "cluster":  # the actors get its source
    shutil.rmtree("mine")
sys.exit(train(config))
"""
# loses a parameter on the way to the second engine, and confirms all of them
FORGETFUL = """

class Forgetful(GenerateBackend):
    async def update_weights(self, update_info):
        named = list(update_info["named"])
        if self.seed == 1:
            for name, tensor in named:
                self.received[name] = digest(tensor)
            named = [(n, t) for n, t in named if "norm" not in n]
        await super().update_weights({"named": named})
"""


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    (folder / "mine").mkdir()
    shutil.copy(EXAMPLE, folder / "mine" / "my_backend.py")
    with open(folder / "mine" / "my_backend.py", "a") as file:
        file.write(FORGETFUL)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return subprocess.run(
        [sys.executable, "-c", RUN, *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def check(folder: Path, done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [line for line in lines(folder, "metrics.jsonl") if "grad_norm" in line]
    assert len(steps) == 3 and all(line["grad_norm"] > 0 for line in steps)
    assert all(line["gap/max"] < 1e-3 for line in steps), "its log-probs are the learner's"
    versions = {v for line in lines(folder, "rollouts.jsonl") for v in line["version"] if v >= 0}
    assert versions == {0, 1, 2}, "each step was sampled with the weights of the one before"


def test_a_backend_of_the_user_s_own_in_one_process(tmp_path):
    check(tmp_path, run(tmp_path, "mode=inline"))


@pytest.mark.stack
@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_on_the_real_stack_two_engines_take_verified_weights(tmp_path, transport):
    check(tmp_path, run(tmp_path, "mode=cluster", f"sync.transport={transport}"))
    syncs = [line for line in lines(tmp_path, "events.jsonl") if line["kind"] == "sync"]
    assert [line["version"] for line in syncs] == [0, 1, 2]
    assert all(line["bytes"] > 0 for line in syncs)
    assert any(line["kind"] == "first_sync" for line in lines(tmp_path, "events.jsonl")), (
        "it scores tokens, so its first update was proved"
    )


@pytest.mark.stack
def test_an_engine_that_loses_a_parameter_ends_the_run(tmp_path):
    done = run(tmp_path, "mode=cluster", "rollout.backend=mine/my_backend.py:Forgetful")
    assert done.returncode != 0
    assert "engines compute with different weights after version 1" in done.stdout + done.stderr
