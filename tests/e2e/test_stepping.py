"""A method decides when its run ends, and goes by evaluations."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tandem.launch.check_config import load
from tandem.launch.run.run import train

METHOD = '''
from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Demand
from tandem.algorithms.sft.sft import SFT


@dataclass
class Stops(SFT):
    """SFT that ends with step `last`, or instead of it."""

    title: ClassVar[str] = "test"
    uses_experts: ClassVar[bool] = True
    last: int = 99
    instead: bool = False

    def __post_init__(self):
        self.seen = {}

    def demand(self, step, budget, signals):
        stop = f"accuracy {signals['eval/accuracy']:.2f}" if step == self.last else ""
        return Demand(experts=0 if stop and self.instead else 4, stop=stop, updates=2)

    def rows(self, batch):
        assert batch.budget.experts == 4 and batch.budget.model and batch.budget.seed == 3
        self.seen["batch"] = batch.signals["eval/reward"]
        return super().rows(batch)

    def observe(self, step, metrics):
        self.seen["observed"] = metrics["eval/reward"]

    def metrics(self, step):
        return {f"seen/{name}": value for name, value in self.seen.items()}
'''
CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "evaluation": {"path": "task:sort", "split": "test", "options": {"digits": 3, "size": 4}},
        "experts_per_step": 4,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "rollout": {"max_tokens": 6},
    "reward": {"functions": [f"{Path(__file__).parent / 'short_reward.py'}:score"]},
    "eval": {"every": 1},
    "learner": {"learning_rate": 1e-2},
    "run": {"steps": 6, "seed": 3},
}


def config(*overrides: str, **method):
    Path("stops.py").write_text(METHOD)
    options = {"name": "stops.py:Stops", **method}
    Path("c.yaml").write_text(yaml.safe_dump({**CONFIG, "method": options}))
    return load("c.yaml", overrides)


def lines(name: str = "run") -> list[dict]:
    path = Path("runs") / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("instead, steps", [(False, 3), (True, 2)])
def test_a_method_ends_its_run(in_tmp, capsys, instead, steps):
    """As after its last step: evaluated, saved, and not gone on with by a resume."""
    assert train(config(last=2, instead=instead)) == 0
    folder = Path("runs/run")
    trained = [line for line in lines() if "grad_norm" in line]
    evaluated = [line["step"] for line in lines() if "eval/accuracy" in line]
    assert len(trained) == steps and evaluated == list(range(steps + 1))
    assert (folder / "checkpoints" / f"step_{steps}").is_dir()
    assert (folder / "model" / "model.safetensors").is_file()
    told = f"the method ended the run after {steps} steps: accuracy"
    assert told in capsys.readouterr().out

    assert train(config("run.resume=true", last=2, instead=instead)) == 0
    assert [line for line in lines() if "grad_norm" in line] == trained
    assert told in capsys.readouterr().out


def test_signals_of_evaluations_are_the_latest_and_survive_a_resume(in_tmp):
    """Two runs of two steps each, of two updates each, say and train the same as one of four."""
    assert train(config("run.name=whole", "run.steps=4")) == 0
    assert train(config("run.name=parts", "run.steps=2")) == 0
    assert train(config("run.name=parts", "run.steps=4", "run.resume=true")) == 0
    rewards = [line["eval/reward"] for line in lines("whole") if "eval/reward" in line]
    assert len(set(rewards)) > 1
    for name in ("whole", "parts"):
        seen = [line for line in lines(name) if "seen/batch" in line]
        assert [line["seen/batch"] for line in seen] == rewards[:4]
        assert [line["seen/observed"] for line in seen] == rewards[:4]
    whole, parts = (
        load_file(Path("runs") / name / "checkpoints" / "step_4" / "model" / "model.safetensors")
        for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
