"""The config: what a user can get wrong is an error that names the key, what was found, what was expected and where it was set."""
import dataclasses

import pytest
import yaml

from tandem.engine.config import Config, ConfigError, load, to_dict

GOOD = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {"prompts": {"path": "task:sort"}, "experts": {"path": "task:sort"}, "experts_per_step": 4},
    "method": {"name": "chord_mu"},
    "reward": {"functions": ["exact"]},
}


@pytest.fixture
def write(tmp_path):
    def write(tree, name="c.yaml"):
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path
    return write


def error(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    return str(caught.value)


def test_defaults_overrides_and_round_trip(write):
    path = write(GOOD)
    config = load(path, ["run.steps=7", "learner.learning_rate=3e-4", "reward.functions=[exact, length]", "data.evaluation.path=task:sort", "model.system_prompt=null"])
    assert (config.run.steps, config.learner.learning_rate, config.reward.functions, config.data.evaluation.path) == (7, 3e-4, ("exact", "length"), "task:sort")
    assert config.rollout.temperature == Config().rollout.temperature and config.model.system_prompt is None
    assert load(write(to_dict(config), "resolved.yaml")) == config


def test_scientific_notation_is_a_number(write):
    assert load(write("model: {path: tandem:tiny}\nmethod: {name: sft}\ndata: {experts: {path: 'task:sort'}, experts_per_step: 1}\nlearner: {learning_rate: 1e-6}\n")
                ).learner.learning_rate == 1e-6


@pytest.mark.parametrize("override, words", [
    ("learner.zero_stge=1", ["learner.zero_stge", "did you mean 'zero_stage'", "on the command line"]),
    ("learnr.zero_stage=1", ["'learnr'", "did you mean 'learner'"]),
    ("learner.zero_stage=4", ["learner.zero_stage", "found 4", "one of 0, 1, 2, 3"]),
    ("mode=inlin", ["mode", "did you mean 'inline'"]),
    ("run.steps=ten", ["run.steps", "found 'ten'", "an integer"]),
    ("run.steps=2.5", ["run.steps", "found 2.5", "an integer"]),
    ("run.steps=true", ["run.steps", "found True", "an integer"]),
    ("run.steps=.inf", ["run.steps", "found inf", "an integer"]),
    ("run.steps=0", ["run.steps is 0", "at least 1"]),
    ("run.steps", ["expected key=value"]),
    ("run.steps.x=1", ["run.steps", "found {'x': 1}", "on the command line"]),
    ("run=3", ["run", "expected a section", "found 3"]),
    ("reward.functions=exact", ["reward.functions", "found 'exact'", "a list of text"]),
    ("learner.betas=[0.9]", ["learner.betas", "2 entries"]),
    ("reward.weights=[1, 2]", ["reward.weights has 2", "1 reward.functions"]),
    ("reward.functions=[]", ["chord_mu", "reward.functions is empty"]),
    ("data.experts=null", ["chord_mu", "demonstrations", "data.experts is not set"]),
    ("data.experts.path=d.jsonl", ["data.experts.response is not set", "column"]),
    ("data.experts_per_step=0", ["data.experts_per_step is 0"]),
    ("data.prompts=null", ["data.prompts is not set"]),
    ("rollout.backend=vllm", ["mode=inline runs without vLLM", "mode=cluster"]),
    ("rollout.backend=replay", ["rollout.record"]),
    ("cluster.learner_ranks=2", ["mode=inline is one process", "2"]),
    ("rollout.temperature=0", ["rollout.temperature is 0", "eval.temperature"]),
    ("rollout.max_model_len=100", ["rollout.max_model_len is 100", "1280"]),
    ("rollout.top_p=0.9", ["rollout.top_p is 0.9", "sync.gate_steps=0"]),
    ("method.name=chrod_mu", ["unknown method 'chrod_mu'", "did you mean 'chord_mu'"]),
    ("method.muu=1", ["no option 'muu'", "did you mean 'mu'"]),
    ("method.name=nowhere.py:M", ["there is no file", "nowhere.py"]),
    ("model.path=''", ["model.path is not set"]),
    ("cluster.engine_gpus=1", ["cluster.engine_gpus is 1", "cluster.learner_gpus is 0", "gloo"]),
])
def test_each_mistake_is_named(write, override, words):
    message = error(write(GOOD), override)
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) <= 10


def test_mistakes_in_the_file_name_the_file(write):
    path = write(GOOD | {"learner": {"learning_rat": 1}})
    assert f"in {path}" in error(path) and "did you mean 'learning_rate'" in error(path)
    assert "not valid YAML" in error(write("model: {path: [}", "broken.yaml"))
    assert "expected a mapping" in error(write("- a\n", "list.yaml"))
    assert "'steps' is a value" in error(write(GOOD | {"run": {"steps": 3}}, "steps.yaml"), "run.steps.x=1")
    assert "did you mean 'c.yaml'" in error(path.parent / "cc.yaml")


def test_a_users_method_file_is_found_and_its_options_checked(write, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.base import Method\n"
        "@dataclass\nclass Mine(Method):\n    strength: float = 1.0\n"
        "class Other: pass\n")
    path = write(GOOD | {"method": {"name": f"{tmp_path}/mine.py:Mine"}})
    assert load(path, ["method.strength=2"]).method["strength"] == 2
    assert "did you mean 'strength'" in error(path, "method.strenth=2")
    assert "Method" in error(path, f"method.name={tmp_path}/mine.py:Other")
    assert "has no 'Absent'" in error(path, f"method.name={tmp_path}/mine.py:Absent")


def test_config_is_frozen(write):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(write(GOOD)).run.steps = 3
