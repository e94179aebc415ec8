"""The section `models`, and models whose ids mean other words than the policy's: all of it is told
before anything starts.
"""

import json
import shutil

import pytest
import yaml

from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.resolve import load_tokenizer
from tandem.engine.model.same_tokens import check_other_models
from tandem.engine.model.tiny import make_tiny
from tandem.launch.check_config import load

BASE = {
    "model": {"path": "tandem:tiny"},
    "data": {"prompts": {"path": "task:sort"}},
    "method": {"name": "opd"},
    "models": {"teacher": {"path": "tandem:tiny"}},
}


def config(tmp_path, **changes):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**BASE, **changes}))
    return load(tmp_path / "c.yaml")


def test_models_by_name(tmp_path):
    found = config(tmp_path, models={"teacher": {"path": "./t"}, "slow": {"kind": "ema"}})
    assert found.models["teacher"].path.endswith("/t") and found.models["slow"].rate == 0.05
    assert config(tmp_path, models={}, method={"name": "opd", "teacher": "reference"})


@pytest.mark.parametrize(
    "models, words",
    [
        ({}, r"'opd' compares the policy with the model 'teacher'.*models.teacher is not set; add"),
        ({"techer": {"path": "x"}}, r"'teacher' \(did you mean 'techer'\?\)"),
        ({"reference": {"path": "x"}}, "models has 'reference', which is the name of a model"),
        ({"a@b": {"path": "x"}}, "models has 'a@b', which is no name"),
        ({"teacher": {}}, "models.teacher.kind is path and models.teacher.path is None"),
        ({"teacher": {"kind": "ema", "path": "x"}}, "no other kind has one"),
        ({"teacher": {"path": "x", "rate": 0.5}}, "models.teacher.rate is 0.5, but only kind ema"),
        ({"teacher": {"kind": "ema", "rate": 0.0}}, "models.teacher.rate"),
    ],
)
def test_models_that_cannot_be(tmp_path, models, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, models=models)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("m") / "start", hidden=32, layers=1)


def changed(folder, tmp_path, change):
    """A copy of the model whose tokenizer.json was changed."""
    copy = tmp_path / "teacher"
    shutil.copytree(folder, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    change(tokenizer)
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    return copy


def check(folder, teacher):
    model = ModelConfig(path=str(folder))
    other = OtherModelConfig(path=str(teacher))
    check_other_models(Config(model=model, models={"teacher": other}), load_tokenizer(model))


def permuted(tokenizer):
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def in_lower_case(tokenizer):
    tokenizer["normalizer"] = {"type": "Lowercase"}


def test_trap_6_equal_size_is_not_enough(folder, tmp_path):
    """A permutation passes a comparison of sizes; so does one vocabulary read in another way."""
    check(folder, changed(folder, tmp_path, lambda tokenizer: None))
    teacher = changed(folder, tmp_path / "p", permuted)
    with pytest.raises(ConfigError, match=r"models.teacher.path is .*id \d+ is 'b' there and 'a'"):
        check(folder, teacher)
    teacher = changed(folder, tmp_path / "l", in_lower_case)
    with pytest.raises(ConfigError, match=r"'What is 12345.* or other ones"):
        check(folder, teacher)


def test_a_model_that_is_not_there_is_told_by_its_own_key(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"models.teacher.path is .*there is no such folder"):
        check(folder, tmp_path / "none")
