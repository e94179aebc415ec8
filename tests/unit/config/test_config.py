"""The config: what a user can get wrong is an error that names the key, what was found, what was
expected and where it was set.
"""

import dataclasses
import math
import subprocess
import sys

import pytest
import yaml

from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.registry import configured
from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load

GOOD = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort"},
        "experts": {"path": "task:sort"},
        "experts_per_step": 4,
    },
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
    config = load(
        path,
        [
            "run.steps=7",
            "learner.learning_rate=3e-4",
            "reward.functions=[exact, length]",
            "data.evaluation.path=task:sort",
            "model.system_prompt=null",
        ],
    )
    assert (
        config.run.steps,
        config.learner.learning_rate,
        config.reward.functions,
        config.data.evaluation.path,
    ) == (7, 3e-4, ("exact", "length"), "task:sort")
    assert (
        config.rollout.temperature == Config().rollout.temperature
        and config.model.system_prompt is None
    )
    assert load(write(to_dict(config), "resolved.yaml")) == config


def test_scientific_notation_is_a_number(write):
    assert (
        load(
            write(
                "model: {path: tandem:tiny}\nmethod: {name: sft}\ndata: {experts: {path: "
                "'task:sort'}, experts_per_step: 1}\nlearner: {learning_rate: 1e-6}\n"
            )
        ).learner.learning_rate
        == 1e-6
    )


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "learner.zero_stge=1",
            ["learner.zero_stge", "did you mean 'zero_stage'", "on the command line"],
        ),
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
        ("rollout.over_sample=-1", ["rollout.over_sample is -1", "at least 0"]),
        ("rollout.over_sample=2", ["rollout.over_sample is 2", "mode is inline", "mode=cluster"]),
        ("cluster.learner_ranks=2", ["mode=inline is one process", "2"]),
        ("rollout.temperature=0", ["rollout.temperature is 0", "eval.temperature"]),
        ("rollout.max_model_len=100", ["rollout.max_model_len is 100", "1280"]),
        ("rollout.top_p=0.9", ["rollout.top_p is 0.9", "sync.gate_steps=0"]),
        ("method.name=chrod_mu", ["unknown method 'chrod_mu'", "did you mean 'chord_mu'"]),
        ("method.muu=1", ["no option 'muu'", "did you mean 'mu'"]),
        ("method.name=nowhere.py:M", ["there is no file", "nowhere.py"]),
        (
            "method.mu=cosine",
            [
                "method.mu:",
                "found 'cosine'",
                "a section or a number",
                "on the command line method.mu",
            ],
        ),
        ("method.mu={kind: cosine, decay: 2.5}", ["method.mu.decay:", "found 2.5", "an integer"]),
        ("method.mu={kind: cosin}", ["unknown schedule kind", "did you mean 'cosine'"]),
        ("method.token_weight=1", ["method.token_weight:", "found 1", "one", "phi"]),
        ("method.policy=3", ["method.policy:", "found 3", "a section or text"]),
        (
            "method.policy.clip_high=high",
            [
                "method.policy.clip_high:",
                "found 'high'",
                "a number",
                "on the command line method.policy.clip_high",
            ],
        ),
        (
            "method.policy.dual_clip=.nan",
            ["method.policy.dual_clip:", "found nan", "a number or nothing"],
        ),
        (
            "method.policy.dynamic_sampling=1",
            ["method.policy.dynamic_sampling:", "found 1", "true or false"],
        ),
        ("method.policy.advantage=[grpo]", ["method.policy.advantage:", "found ['grpo']", "text"]),
        ("method.policy.preset=[grpo]", ["method.policy.preset:", "found ['grpo']", "text"]),
        ("method.policy.kl={kind: linear, peak: x}", ["method.policy.kl.peak:", "found 'x'"]),
        (
            "method.policy={advantage: gae, critic: 3}",
            ["method.policy.critic:", "found 3", "a section"],
        ),
        (
            "method.policy={advantage: gae, critic: {lam: low}}",
            ["method.policy.critic.lam:", "found 'low'"],
        ),
        (
            "method.policy.clip_hi=1",
            ["method.policy has no option 'clip_hi'", "did you mean 'clip_high'"],
        ),
        ("method={name: sft_rl, sft_steps: 2.5}", ["method.sft_steps:", "found 2.5", "an integer"]),
        (
            "method={name: sft_rl, sft_learning_rate: fast}",
            ["method.sft_learning_rate:", "found 'fast'", "a number or nothing"],
        ),
        (
            "method={name: visurf, smoothing: 'yes'}",
            ["method.smoothing:", "found 'yes'", "true or false"],
        ),
        ("method={name: uft, segments: true}", ["method.segments:", "found True", "an integer"]),
        ("model.path=''", ["model.path is not set"]),
        (
            "cluster.engine_gpus=1",
            ["cluster.engine_gpus is 1", "cluster.learner_gpus is 0", "gloo"],
        ),
    ],
)
def test_each_mistake_is_named(write, override, words):
    message = error(write(GOOD), override)
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) <= 10


@pytest.mark.parametrize(
    "override, words",
    [
        ("learner.zero_stage=true", "learner.zero_stage: found True, expected one of 0, 1, 2, 3"),
        ("run.resume=1", "run.resume: found 1, expected one of false, true, auto"),
        ("run.save_model='yes'", "run.save_model: found 'yes', expected true or false"),
        ("run.save_model=1", "run.save_model: found 1, expected true or false"),
        ("run.seed=1e400", "run.seed: found '1e400', expected an integer"),
        ("run.seed=9223372036854775808", "run.seed: found 9223372036854775808, expected an int"),
        ("learner.weight_decay=.nan", "learner.weight_decay: found nan, expected a number"),
        ("learner.betas=[0.9, 1]", "learner.betas[1] is 1, must be less than 1"),
        ("learner.learning_rate=0", "learner.learning_rate is 0, must be more than 0"),
        ("rollout.top_p=1.5", "rollout.top_p is 1.5, must be at most 1"),
        ("reward.memory_gib=0", "reward.memory_gib is 0, must be more than 0, or null"),
        ("cluster.port=70000", "cluster.port is 70000, must be at most 65535, or null"),
        ("data.prompts=3", "data.prompts: found 3, expected a section or nothing"),
        ("run=null", "run: found None, expected a section"),
        ("steps=3", "unknown key 'steps' (did you mean 'run.steps'?)"),
        ("run={3: 4}", "unknown key 'run.3'"),
    ],
)
def test_types_are_strict_and_bounds_are_told(write, override, words):
    message = error(write(GOOD), override)
    assert words in message and "set on the command line" in message


def test_a_number_may_be_written_as_text(write):
    config = load(write(GOOD), ["run.steps=1e3", "run.seed='7'", "learner.zero_stage=2.0"])
    assert (config.run.steps, config.run.seed, config.learner.zero_stage) == (1000, 7, 2)


def test_several_mistakes_are_told_at_once_and_no_more_than_a_few(write):
    path = write(GOOD | {"learner": {"zero_stage": 5}})
    lines = error(path, "run.stepz=3", "eval.every=-1").splitlines()
    assert len(lines) == 3
    assert f"set in {path}" in lines[0] and "eval.every is -1" in lines[1]
    assert "did you mean 'steps'" in lines[2]
    wrong = [f"run.wrong{number}=1" for number in range(9)]
    assert error(path, *wrong).splitlines()[-1] == "and 5 more"


def test_a_process_that_holds_a_config_needs_no_pydantic():
    code = (
        "import pickle, sys; from tandem.engine.config.schema import Config\n"
        "assert pickle.loads(pickle.dumps(Config())) == Config()\n"
        "sys.exit('pydantic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


def test_over_sampling_is_for_engines_that_can_abort_and_steps_with_groups_to_abort(write):
    cluster = GOOD | {"mode": "cluster"}
    assert load(write(cluster), ["rollout.over_sample=2"]).rollout.over_sample == 2
    replay = ["rollout.over_sample=2", "rollout.backend=replay", "rollout.record=r.jsonl"]
    assert "rollout.over_sample is 2, but rollout.backend is replay" in error(
        write(cluster), *replay
    )
    aligned = ["rollout.over_sample=2", "method={name: luffy}", "rollout.prompts_per_step=4"]
    assert load(write(cluster), [*aligned, "data.experts_per_step=3"]).rollout.over_sample == 2
    message = error(write(cluster), *aligned, "data.experts_per_step=4")
    assert (
        "all rollout.prompts_per_step=4 groups have a demonstration (data.experts_per_step=4)"
        in message
        and "never aborted" in message
    )


def test_mistakes_in_the_file_name_the_file(write):
    path = write(GOOD | {"learner": {"learning_rat": 1}})
    assert f"in {path}" in error(path) and "did you mean 'learning_rate'" in error(path)
    assert "not valid YAML" in error(write("model: {path: [}", "broken.yaml"))
    assert "expected a mapping" in error(write("- a\n", "list.yaml"))
    assert "'steps' is a value" in error(
        write(GOOD | {"run": {"steps": 3}}, "steps.yaml"), "run.steps.x=1"
    )
    assert "did you mean 'c.yaml'" in error(path.parent / "cc.yaml")


def test_a_users_method_file_is_found_and_its_options_checked(write, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tandem.algorithms.base import Method\n"
        "@dataclass\nclass Mine(Method):\n    strength: float = 1.0\n"
        "    def rows(self, batch): ...\n    def terms(self, batch): ...\n"
        "class Other: pass\n"
    )
    path = write(GOOD | {"method": {"name": f"{tmp_path}/mine.py:Mine"}})
    assert load(path, ["method.strength=2"]).method["strength"] == 2
    assert "did you mean 'strength'" in error(path, "method.strenth=2")
    assert "Method" in error(path, f"method.name={tmp_path}/mine.py:Other")
    assert "has no 'Absent'" in error(path, f"method.name={tmp_path}/mine.py:Absent")


@pytest.mark.parametrize(
    "override, option, expected",
    [
        # 2e-4 is text to YAML 1.1
        (
            "method={name: sft_rl, sft_learning_rate: 2e-4, sft_steps: 3.0}",
            lambda m: (m.sft_learning_rate, m.sft_steps),
            (2e-4, 3),
        ),
        ("method={name: sft_rl, sft_learning_rate: null}", lambda m: m.sft_learning_rate, None),
        ("method.mu=5e-2", lambda m: m.mu, Schedule("constant", peak=0.05)),
        (
            "method.mu={kind: reward_gap, peak: 5e-1, valley: 0}",
            lambda m: m.mu,
            Schedule("reward_gap", peak=0.5),
        ),
        (
            "method.policy={clip_high: .inf, kl: 1e-3}",
            lambda m: (m.policy.clip_high, m.policy.kl.peak),
            (math.inf, 1e-3),
        ),
        (
            (
                "method.policy={preset: ppo, critic: {lam: 95e-2, kl: {kind: step, peak: 1e-2, "
                "decay: 4}}}"
            ),
            lambda m: (m.policy.critic.lam, m.policy.critic.kl.peak),
            (0.95, 0.01),
        ),
    ],
)
def test_options_of_a_method_are_read_as_the_other_keys_are(write, override, option, expected):
    found = option(configured(load(write(GOOD), [override]).method))
    assert found == expected and type(found) is type(expected)


def test_options_of_a_users_method_are_held_to_their_annotations(write, tmp_path):
    (tmp_path / "typed.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\nfrom "
        "typing import Any, Literal\nfrom tandem.algorithms.base import Method\n"
        "@dataclass\nclass Typed(Method):\n    side: Literal['left', 'right'] = 'left'\n    "
        "layers: list[int] = field(default_factory=list)\n    free: Any = None\n    bound: "
        "int | str = 1\n    def rows(self, batch): ...\n    def terms(self, batch): ...\n"
    )
    path = write(
        GOOD
        | {
            "method": {
                "name": f"{tmp_path}/typed.py:Typed",
                "side": "right",
                "layers": [1],
                "free": {"a": 1},
                "bound": "7",
            }
        }
    )
    method = configured(load(path).method)
    assert (method.side, method.layers, method.free, method.bound) == ("right", [1], {"a": 1}, "7")
    assert (
        "method.side: found 'rigth' (did you mean 'right'?), expected one of left, right"
        in error(path, "method.side=rigth")
    )
    assert "method.bound: found [1], expected an integer or text" in error(path, "method.bound=[1]")


def test_config_is_frozen(write):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(write(GOOD)).run.steps = 3


def test_a_key_of_an_earlier_version_says_what_to_write_instead(write):
    text = error(write(GOOD), "run.fake_reward=true")
    assert text.startswith("run.fake_reward, set on the command line, is no key any more")
    assert "reward.functions=[fake]" in text
