"""What a resume compares, without a run: one spelling for what means the same, content in the place
of names.
"""

import json
import os
import shutil

import pytest
import torch
import yaml

from tandem.engine.config.parse import to_dict
from tandem.engine.config.schema import Config, LearnerConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.data.sources import PromptSource
from tandem.engine.learner.local_engine import adamw, follow
from tandem.engine.model.resolve import load_tokenizer, resolve_model
from tandem.launch.check_config import load
from tandem.launch.run import resume
from tandem.launch.run.content import contents, model_digest
from tandem.launch.run.resume import Facts

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {"prompts": {"path": "task:sort"}, "max_prompt_tokens": 32},
    "method": {"name": "grpo"},
    "reward": {"functions": ["exact"]},
}
REWARD = "def score(prompt, completion, **columns):\n    return 1.0\n"


@pytest.fixture
def config(in_tmp):
    def config(*overrides: str) -> Config:
        (in_tmp / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        return load("c.yaml", overrides)

    return config


def facts(config: Config) -> Facts:
    """As they come back out of a manifest."""
    path = resolve_model(config.model)
    prompts = PromptSource(
        config.data.prompts,
        config.data,
        load_tokenizer(config.model),
        config.model,
        config.run.seed,
    )
    found = resume.facts_of(config, contents(config, {"data.prompts": prompts}, path))
    return Facts(**json.loads(json.dumps(found.__dict__)))


def changes(before: Config | Facts, now: Config) -> list[str]:
    former = before if isinstance(before, Facts) else facts(before)
    resume.check_fixed(now, former, 1)
    return resume.check_changes(now, former, facts(now))


@pytest.mark.parametrize(
    "override",
    [
        "method={name: grpo, policy: grpo}",
        "reward.weights=[1.0]",
        "data.prompts.options={seed: 0, digits: 8, size: null}",
        "rollout.backend=hf",
        "learner.learning_rate=0.000001",
        "data.chat=null",
    ],
)
def test_other_words_for_the_same(config, override):
    assert changes(config(), config(override)) == []
    assert changes(config(override), config()) == []


@pytest.mark.parametrize(
    "override, key",
    [
        ("mode=cluster", "mode"),
        ("method.name=rl_with_sft", "method.name"),
        ("learner.zero_stage=2", "learner.zero_stage"),
        ("model.dtype=bfloat16", "model.dtype"),
    ],
)
def test_what_no_key_allows(config, override, key):
    more = [
        "data.experts={path: 'task:sort', response: answer, options: {size: 4}}",
        "data.experts_per_step=1",
    ]
    allowed = f"run.resume_changes=[{key}]"
    with pytest.raises(ConfigError, match=f"does not fit(.|\n)*  {key}: "):
        resume.check_fixed(config(override, allowed, *more), resume.facts_of(config(*more)), 1)


def test_all_that_differs_is_one_list(config):
    with pytest.raises(ConfigError) as caught:
        changes(
            config(), config("run.seed=3", "learner.grad_clip=2", "data.prompts.options.digits=3")
        )
    lines = [line.strip() for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert lines[0].startswith("data.prompts: the content differs")
    assert lines[1:] == ["learner.grad_clip: 1.0 -> 2.0", "run.seed: 0 -> 3"]
    assert "run.resume_changes=[data.prompts, learner.grad_clip, run.seed]" in str(caught.value)


def test_what_the_message_says_is_what_allows_it(config):
    allowed = "run.resume_changes=[data.prompts, learner.grad_clip, run.seed]"
    told = changes(
        config(),
        config("run.seed=3", "learner.grad_clip=2", "data.prompts.options.digits=3", allowed),
    )
    assert len(told) == 3 and all(text.startswith("resumed with a change: ") for text in told)


@pytest.mark.parametrize("key", ["learner.learning_rat", "nothing", "", "data.prompts.pth"])
def test_a_key_to_allow_that_is_none(config, key):
    with pytest.raises(ConfigError, match="resume_changes"):
        config(f"run.resume_changes=['{key}']")


def test_longer_is_free_but_a_schedule_moves(config):
    assert changes(config(), config("run.steps=20")) == [
        "resumed with a change: run.steps: 10 -> 20"
    ]
    cosine = "learner.schedule=cosine"
    told = changes(config(cosine), config(cosine, "run.steps=20"))
    assert "learning rate of the steps to come is that of a run of 20 steps, not 10" in told[-1]


def test_a_project_that_moved_is_the_same(config, in_tmp, monkeypatch):
    config()  # writes c.yaml
    (in_tmp / "a").mkdir()
    (in_tmp / "a" / "rows.jsonl").write_text('{"prompt": "sort 21=", "answer": "12"}\n')
    (in_tmp / "a" / "reward.py").write_text(REWARD)
    shutil.copytree(resolve_model(config().model), in_tmp / "a" / "model")
    overrides = (
        "data.prompts.path=./rows.jsonl",
        "reward.functions=[reward.py:score]",
        "model.path=./model",
        "reward.options={'reward.py:score': {}}",
    )
    monkeypatch.chdir(in_tmp / "a")
    before = facts(load("../c.yaml", overrides))
    monkeypatch.chdir(in_tmp)
    (in_tmp / "a").rename(in_tmp / "b")
    monkeypatch.chdir(in_tmp / "b")
    assert changes(before, load("../c.yaml", overrides)) == []
    (in_tmp / "b" / "reward.py").write_text(REWARD.replace("1.0", "0.5"))
    with pytest.raises(ConfigError, match=r"reward.functions: "):
        changes(before, load("../c.yaml", overrides))


def test_an_edited_reward_is_told(config, in_tmp):
    (in_tmp / "reward.py").write_text(REWARD)
    mine = "reward.functions=[reward.py:score]"
    before = facts(config(mine))
    (in_tmp / "reward.py").write_text(REWARD + "# mended\n")
    assert changes(before, config(mine)) == [
        f"warning: {in_tmp / 'reward.py'} was edited since the checkpoint was written"
    ]


def test_a_model_that_was_trained_further_in_its_place_is_another(in_tmp):
    (in_tmp / "config.json").write_text("{}")
    weights = in_tmp / "model.safetensors"
    weights.write_bytes(b"\0" * (6 << 20))
    before = model_digest(str(in_tmp))
    os.utime(weights, (0, 0))
    assert model_digest(str(in_tmp)) == before
    weights.write_bytes(b"\0" * ((6 << 20) - 1) + b"\1")
    assert model_digest(str(in_tmp)) != before


def test_a_config_of_an_older_version_lacks_new_keys(config):
    tree = to_dict(config())
    del (
        tree["run"]["resume_changes"],
        tree["learner"]["head_chunk"],
        tree["data"]["prompts"]["limit"],
    )
    assert changes(Facts(tree), config()) == []
    tree["learner"]["grad_clip"] = 3.0
    with pytest.raises(ConfigError, match=r"learner.grad_clip: 3.0 -> 1.0"):
        changes(Facts(tree), config())


def test_settings_of_the_optimizer_that_were_allowed_to_change_do_change():
    weight = torch.nn.Parameter(torch.ones(2))
    saved = adamw([weight], LearnerConfig(betas=(0.9, 0.99), weight_decay=0.1)).state_dict()
    now = LearnerConfig(betas=(0.5, 0.6), weight_decay=0.3)
    optimizer = adamw([weight], now)
    optimizer.load_state_dict(saved)
    follow(optimizer, now)
    assert (
        optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        and optimizer.param_groups[0]["weight_decay"] == 0.3
    )
