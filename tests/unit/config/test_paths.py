"""Paths are resolved once, at the start: what user code does to the process changes nothing."""

import json
from pathlib import Path

import pytest
import yaml

from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import read_jsonl
from tandem.engine.model import tiny
from tandem.engine.model.resolve import resolve_model
from tandem.launch import cli
from tandem.launch.check_config import load
from tandem.launch.run import run

REWARD = """
import os, sys
def score(completion, answer, meta, **columns):
    os.chdir("/")
    sys.argv[:] = ["changed"]
    meta["seen"].append(1)
    columns["prompt_extra"] = "x"
    return float(len(meta["seen"]))
"""
METHOD = """
import os, sys
os.chdir("/")
sys.argv[:] = ["changed"]
from dataclasses import dataclass
from tandem.algorithms.rl.grpo import GRPO
@dataclass
class Mine(GRPO):
    def rows(self, batch):
        os.chdir("/")
        return super().rows(batch)
"""
CONFIG = {
    "mode": "inline",
    "model": {"path": "models/m"},
    "method": {"name": "mine.py:Mine"},
    "data": {
        "prompts": {"path": "./data/d.jsonl"},
        "evaluation": {"path": "data/d.jsonl"},
        "max_prompt_tokens": 32,
    },
    "reward": {"functions": ["rewards/r.py:score"], "options": {"rewards/r.py:score": {}}},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 4},
    "learner": {"head_chunk": 64},
    "run": {"name": "r", "steps": 2, "checkpoint_every": 1},
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a config all of whose paths are relative; the current folder is that folder."""
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "rewards", "models"):
        Path(folder).mkdir()
    rows = [{"prompt": f"say {i}", "answer": str(i), "meta": {"seen": []}} for i in range(4)]
    Path("data/d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("rewards/r.py").write_text(REWARD)
    Path("mine.py").write_text(METHOD)
    Path("c.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_what_is_a_path_becomes_absolute_and_what_is_none_stays(project):
    Path("models/m").mkdir()
    config = load(
        "c.yaml",
        [
            "rollout.record=../x/rollouts.jsonl",
            "model.tokenizer=~/tok",
            "data.experts={path: gsm8k/main, response: a}",
        ],
    )
    here = str(project)
    assert config.model.path == f"{here}/models/m"
    assert config.model.tokenizer == str(Path.home() / "tok")
    assert config.data.prompts.path == config.data.evaluation.path == f"{here}/data/d.jsonl"
    assert config.data.experts.path == "gsm8k/main"
    assert config.reward.functions == (f"{here}/rewards/r.py:score",)
    assert config.reward.options == {f"{here}/rewards/r.py:score": {}}
    assert config.method["name"] == f"{here}/mine.py:Mine"
    assert config.rollout.record == str(project.parent / "x/rollouts.jsonl")
    assert config.run.dir == f"{here}/runs"
    Path("again.yaml").write_text(yaml.safe_dump(to_dict(config)))
    assert load("again.yaml") == config


@pytest.mark.parametrize(
    "key, name",
    [
        ("model.path", "tandem:tiny"),
        ("model.path", "Qwen/Qwen2.5-0.5B"),
        ("model.path", "gpt2"),
        ("data.prompts.path", "task:sort"),
        ("data.prompts.path", "reasoning_gym:gcd"),
        ("data.prompts.path", "openai/gsm8k"),
        ("data.prompts.path", "hf://datasets/x/y.parquet"),
    ],
)
def test_names_stay(project, key, name):
    config = to_dict(load("c.yaml", [f"{key}={name}"]))
    for part in key.split("."):
        config = config[part]
    assert config == name


@pytest.mark.parametrize(
    "value, expected",
    [
        ("x.jsonl", "{here}/x.jsonl"),
        ("[a/*.csv, '/b.csv']", ["{here}/a/*.csv", "/b.csv"]),
        ("{train: x.csv}", {"train": "{here}/x.csv"}),
        ("'https://h/x.csv'", "https://h/x.csv"),
    ],
)
def test_files_in_the_options_of_a_builder(project, value, expected):
    options = f"data.prompts={{path: json, options: {{data_files: {value}, field: data}}}}"
    found = load("c.yaml", [options]).data.prompts.options
    assert str(found["data_files"]) == str(expected).replace("{here}", str(project))
    assert found["field"] == "data"


@pytest.mark.whole_run
def test_a_run_does_not_notice_what_users_code_does_to_the_process(project):
    tiny.make_tiny("models/m", hidden=32, layers=1, heads=1)
    config = load("c.yaml")
    assert Path.cwd() == project  # the method's file went elsewhere when it was imported
    assert run.train(config) == 0
    assert sorted(p.name for p in project.iterdir() if p.suffix != ".yaml") == [
        "data",
        "mine.py",
        "models",
        "rewards",
        "runs",
    ]
    lines = list(read_jsonl(project / "runs/r/rollouts.jsonl"))
    assert {line["prompt_id"].rpartition(":")[0] for line in lines} == {"data/d.jsonl"}
    assert all(line["columns"]["meta"] == {"seen": []} for line in lines)
    assert all(line["parts"] == {"rewards/r.py:score": 1.0} for line in lines)
    start = json.loads((project / "runs/r/environment.json").read_text())[0]
    assert start["folder"] == str(project) and start["command"] != ["changed"]
    assert (project / "runs/r/model/config.json").is_file()


@pytest.mark.whole_run
def test_worker_and_inline_rewards_get_the_same_rows(project):
    import numpy as np

    from tandem.engine.core.types import Prompt
    from tandem.rollout.rewards.runner import RewardRunner

    prompt = Prompt("p", np.zeros(1, np.int32), "p", {"answer": "1", "meta": {"seen": []}})
    tiny.make_tiny("models/m", hidden=32, layers=1, heads=1)
    config = load("c.yaml").reward
    for inline in (True, False):
        runner = RewardRunner(config, inline=inline)
        ids = [np.zeros(1, np.int32)] * 3
        outcomes = runner.submit(prompt, ["a", "b", "c"], ids).result(60)
        runner.close()
        assert [outcome.value for outcome in outcomes] == [1.0, 1.0, 1.0]
        assert prompt.columns["meta"] == {"seen": []}


def test_the_tiny_model_goes_where_it_can_be_written(in_tmp, monkeypatch):
    cache = in_tmp / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(tiny.tempfile, "tempdir", str(in_tmp / "tmp"))
    (in_tmp / "tmp").mkdir()
    model = ModelConfig(path="tandem:tiny")
    (in_tmp / "models").write_text("a file: no folder can be made here")
    assert resolve_model(model) == str(cache / "tandem/tiny")
    (in_tmp / "cache2").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_tmp / "cache2"))
    found = Path(resolve_model(model))
    assert found.parent.parent == in_tmp / "tmp" and (found / "config.json").is_file()
    (in_tmp / "models").unlink()
    assert resolve_model(model) == str(in_tmp / "models/tiny")


def test_a_half_made_tiny_model_is_named(in_tmp):
    (in_tmp / "models/tiny").mkdir(parents=True)
    (in_tmp / "models/tiny/model.safetensors").write_text("")
    with pytest.raises(ConfigError, match=r"models/tiny.*no config.json"):
        resolve_model(ModelConfig(path="tandem:tiny"))


@pytest.mark.whole_run
def test_eval_of_a_run_folder_that_was_moved(project, monkeypatch, capsys):
    tiny.make_tiny("models/m", hidden=32, layers=1, heads=1)
    assert cli.main(["train", "c.yaml", "run.steps=1", "run.checkpoint_every=0"]) == 0
    moved = project / "it's: no #1 ${x}/r2"
    moved.parent.mkdir()
    monkeypatch.chdir(project)
    Path("runs/r").rename(moved)
    assert cli.main(["eval", str(moved)]) == 0
    assert [p.name for p in moved.parent.iterdir() if p.name.startswith("r2_eval")]
    assert not list((project / "runs").iterdir())
