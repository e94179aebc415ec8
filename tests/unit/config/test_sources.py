"""Named sources of demonstrations in a config."""

import pytest
import yaml

from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.launch.check_config import load

CHAT = {"path": "chat.jsonl", "prompt": "messages", "response": "messages"}
PAIRS = {"path": "pairs.jsonl", "chosen": "good", "rejected": "bad"}
OWN = """
from dataclasses import dataclass
from typing import ClassVar
from tandem.algorithms.sft.sft import SFT

@dataclass
class Preference(SFT):
    title: ClassVar[str] = "test"
    uses_pairs: ClassVar[bool] = True
"""


@pytest.fixture
def config(in_tmp):
    def config(data, method="sft", *overrides):
        (in_tmp / "own.py").write_text(OWN)
        (in_tmp / "c.yaml").write_text(
            yaml.safe_dump(
                {
                    "mode": "inline",
                    "model": {"path": "tandem:tiny"},
                    "data": {"experts_per_step": 4, **data},
                    "method": {"name": method},
                }
            )
        )
        return load("c.yaml", overrides)

    return config


def test_sources_have_the_keys_of_a_dataset(config, in_tmp):
    scores = {**CHAT, "scores": "s.jsonl"}
    data = config(
        {"experts": CHAT, "sources": {"old": scores}},
        "sft",
        "data.sources.new.path=n.jsonl",
        "data.sources.new.response=answer",
    ).data
    assert list(data.demonstrations) == ["experts", "old", "new"]
    assert data.sources["new"] == DatasetConfig(path=f"{in_tmp}/n.jsonl", response="answer")
    assert data.sources["old"].path == f"{in_tmp}/chat.jsonl"
    assert data.sources["old"].scores == f"{in_tmp}/s.jsonl"
    assert list(config({"sources": {"old": CHAT}}).data.demonstrations) == ["old"]


def test_a_variable_may_stand_in_a_source(config, monkeypatch):
    monkeypatch.setenv("SPLIT", "dev")
    source = config({"sources": {"a": {**CHAT, "split": "${SPLIT}"}}}).data.sources["a"]
    assert source.split == "dev" and source.split.reference == "${SPLIT}"


@pytest.mark.parametrize(
    "data, words",
    [
        ({"sources": {"a": {**CHAT, "respnse": "x"}}}, ["data.sources.a.respnse", "'response'"]),
        ({"sources": {"a": {**CHAT, "limit": 0}}}, ["data.sources.a.limit is 0", "at least 1"]),
        ({"sources": {"a": "chat.jsonl"}}, ["data.sources.a: found 'chat.jsonl'", "a section"]),
        ({"sources": {3: CHAT}}, ["data.sources: found 3, expected text"]),
        ({"sources": {"a.b": CHAT}}, ["data.sources has 'a.b'", "is no name"]),
        ({"experts": CHAT, "sources": {"experts": CHAT}}, ["'experts'", "at data.experts"]),
        ({"sources": {"a": {"path": "x.jsonl"}}}, ["data.sources.a.response is not set"]),
        ({"experts": {**PAIRS, "rejected": None}}, ["data.experts.rejected is None", "both"]),
        ({"experts": {**PAIRS, "rejected": "good"}}, ["the same column, 'good'"]),
        ({"experts": {**PAIRS, "response": "a"}}, ["data.experts.response is 'a' as well"]),
        ({"experts": PAIRS}, ["data.experts gives pairs", "'sft'", "data.experts.response=good"]),
        ({"experts": {**CHAT, "prompt": "p", "train_on": "all"}}, ["train_on", "in one column"]),
        ({"experts": {**CHAT, "train_on": "every"}}, ["'every'", "all_and_calls"]),
        ({"experts": CHAT, "prompts": {**CHAT, "role": "r"}}, ["data.prompts.role", "only demon"]),
        ({}, ["data.experts is not set"]),
    ],
)
def test_mistakes_are_told(data, words, config):
    with pytest.raises(ConfigError) as error:
        config(data)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_source_that_stands_twice(in_tmp):
    (in_tmp / "c.yaml").write_text("data: {sources: {a: {path: x}, b: {path: y}, a: {path: z}}}")
    with pytest.raises(ConfigError, match="the key 'a' is given twice"):
        load("c.yaml")


def test_pairs_are_for_methods_that_tell_them_apart(config):
    assert config({"experts": PAIRS}, "own.py:Preference").data.experts.chosen == "good"
    assert config({"experts": CHAT, "sources": {"p": PAIRS}}, "own.py:Preference")
    with pytest.raises(ConfigError, match="trains on pairs, but no source gives any"):
        config({"experts": CHAT}, "own.py:Preference")
    rollouts = {"prompts": {"path": "task:sort"}, "experts": {**CHAT, "train_on": "all"}}
    with pytest.raises(ConfigError, match="takes its prompts from data"):
        config(rollouts, "luffy", "reward.functions=[exact]")
