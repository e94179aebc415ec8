"""Every method trains for two steps: in this process with the tiny model, and (nightly) on Ray,
vLLM and DeepSpeed with the config that ships for it.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tandem.algorithms.registry import METHODS, make_method, method_class
from tandem.engine.model.tiny import make_tiny
from tandem.launch.check_config import load
from tandem.launch.run.run import train

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
REWARD = Path(__file__).parent / "short_reward.py"
SMALL = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "sources": {"general": {"path": "task:chain", "options": {"size": 16}}},
        "experts_per_step": 2,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 3, "max_tokens": 6},
    "reward": {"functions": [f"{REWARD}:score"]},
    "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 128},
    "run": {"steps": 2, "save_model": False},
}
OPTIONS = {
    "sft_rl": {"sft_steps": 1},
    "reft": {"sft_steps": 1},
    "alternating": {"every": 2},
    "relift": {"buffer": 1},
    "sasr": {"warmup": 1},
    "uft": {"p": 0.7},
    "dmt": {"special_steps": 1},
    "raft": {"correct": 0.25},  # which a response of at most 6 tokens has
    "nft": {"correct": 0.26},  # shorter than that: some of 16
}


def steps(folder: Path) -> list[dict]:
    lines = [
        json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    return [line for line in lines if "grad_norm" in line]


PAIRS = [
    "data.experts.path=task:pairs",
    "data.experts.chosen=answer",
    "data.experts.rejected=wrong",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Another model than the one that is trained."""
    return make_tiny(tmp_path_factory.mktemp("teacher") / "teacher", seed=1)


NEVER = "reward.functions=[exact]"  # which the untrained model never gets
TALK = "{path: task:talk, prompt: messages, response: messages, train_on: all, options: {size: 16}}"
# what a method asks for that the others do not
NEEDED = {
    "sdft": ["data.max_prompt_tokens=128"],  # for the demonstration in it
    "relift": [NEVER],  # both turn to the demonstrations
    "hpt": [NEVER],
    "nft": ["rollout.samples_per_prompt=16"],
    "mupas": [f"data.experts={TALK}", "data.max_expert_tokens=64"],
    "erank": ["data.prompts.path=task:relevance"],  # its columns
    "poft": ["data.experts.path=task:pairs"],  # its column
}


def taught(name, teacher) -> list[str]:
    """The teacher, for methods that have one."""
    if "teacher" not in make_method(name, {}).compares_with:
        return []
    return [f"models.teacher.path={teacher}"]


def needed(name, teacher) -> list[str]:
    found = [*NEEDED.get(name, []), *taught(name, teacher)]
    if METHODS[name] == "preference" and name not in ("spin", "poft"):
        found += PAIRS
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_in_one_process(tmp_path, name, teacher):
    """Real sampling, prefixes and demonstrations included; the gate between sampler and learner
    holds for forced tokens as well.
    """
    config = tmp_path / "config.yaml"
    overrides = [f"run.dir={tmp_path}"]
    overrides += needed(name, teacher)
    config.write_text(yaml.safe_dump({**SMALL, "method": {"name": name, **OPTIONS.get(name, {})}}))
    assert train(load(config, overrides)) == 0
    done = steps(tmp_path)
    assert len(done) == 2 and all(
        math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in done
    )
    assert any(line["grad_norm"] > 0 for line in done)


def shipped() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.yaml"))


def test_every_method_ships_a_config():
    names = {
        yaml.safe_load(path.read_text())["method"]["name"] for path in CONFIGS.glob("[!_]*.yaml")
    }
    assert names == set(METHODS), (
        "one file per method under configs/methods, and presets of grpo beside them"
    )


@pytest.mark.parametrize(
    "path",
    sorted(CONFIGS.parent.rglob("[!_]*.yaml")),
    ids=lambda path: str(path.relative_to(CONFIGS.parent)),
)
def test_every_shipped_config_is_valid(path):
    config = load(path)
    assert path.parent.name != "paper" or method_class(config.method["name"]).title
    if path.parent.name == "methods":
        assert config.run.name == path.stem and config.model.path == "tandem:tiny"


@pytest.mark.nightly
@pytest.mark.stack
@pytest.mark.parametrize("name", shipped())
def test_two_steps_on_the_real_stack(tmp_path, name, teacher):
    small = [
        "run.steps=2",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=4",
        "data.experts_per_step=4",
        "data.evaluation=null",
        "run.save_model=false",
        f"run.dir={tmp_path}",
        "run.name=run",
        f"reward.functions=[{REWARD}:score]",
        "reward.options={}",
        "cluster.engine_cpus=0.5",
        "cluster.learner_cpus=0.5",
    ]
    method = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["method"]["name"]
    # so that two steps show both stages
    small += [f"method.{key}={value}" for key, value in OPTIONS.get(method, {}).items()]
    small += taught(method, teacher)
    if method == "opd":
        small.append("cluster.learner_ranks=2")  # each has the teacher
    result = subprocess.run(
        [sys.executable, "-m", "tandem.launch.cli", "train", str(CONFIGS / f"{name}.yaml"), *small],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    done = steps(tmp_path)
    assert (
        len(done) == 2
        and all(math.isfinite(line["grad_norm"]) for line in done)
        and any(line["grad_norm"] > 0 for line in done)
    )
