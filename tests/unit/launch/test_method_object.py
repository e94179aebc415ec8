"""A method made in Python, in the place of the config's: tandem.train(config, method=...)."""

import json
import threading
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml

import tandem
from tandem.algorithms.given import Absent, give, options_of
from tandem.algorithms.registry import configured


@dataclass
class Mine(tandem.Method):
    """SFT that counts its steps."""

    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    scale: float = 2.0
    seen: list = field(default_factory=list)

    def rows(self, batch):
        self.seen.append(batch.step)
        return [tandem.expert_row(t, "mine") for t in batch.experts]

    def terms(self, batch):
        return [tandem.Term("mine", tandem.NLL(), coefficient=self.scale)]

    def metrics(self, step):
        return {"mine/steps": float(len(self.seen))}

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = list(state["seen"])


@pytest.fixture
def config(tmp_path):
    values = {
        "mode": "inline",
        "model": {"path": "tandem:tiny"},
        "data": {
            "experts": {"path": "task:sort", "options": {"digits": 3, "size": 8}},
            "experts_per_step": 2,
            "max_expert_tokens": 16,
            "max_prompt_tokens": 32,
        },
        "run": {"steps": 2, "save_model": False, "dir": str(tmp_path), "name": "run"},
        "method": {"name": "sft"},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def metrics(tmp_path):
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.whole_run
def test_a_run_with_an_object_and_its_resume(tmp_path, config):
    method = Mine(scale=3.0)
    assert tandem.train(tandem.load(config), method=method) == 0
    assert method.seen == [], "a run works on a copy"
    found = metrics(tmp_path)
    assert [line["mine/steps"] for line in found] == [1.0, 2.0]
    assert found[0]["loss"] == pytest.approx(3 * found[0]["loss/mine"])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]
    assert written["name"] == "Mine (object)"
    assert written["options"] == {"scale": 3.0, "seen": []} and len(written["code"]) == 16

    longer = ["run.steps=3", "run.resume=true"]
    assert tandem.train(tandem.load(config, longer, method=method)) == 0
    assert [line["mine/steps"] for line in metrics(tmp_path)] == [1.0, 2.0, 3.0]
    with pytest.raises(tandem.ConfigError, match=r"method\.options\.scale"):
        tandem.train(tandem.load(config, [*longer, "run.steps=4"]), method=Mine(scale=1.0))


def test_the_config_is_checked_for_the_object(config):
    @dataclass
    class Rolls(Mine):
        uses_rollouts: ClassVar[bool] = True

    with pytest.raises(tandem.ConfigError, match=r"'Rolls \(object\)' trains on rollouts, but"):
        tandem.train(tandem.load(config), method=Rolls())
    with pytest.raises(tandem.ConfigError, match=r"'Rolls \(object\)' trains on rollouts, but"):
        tandem.load(config, method=Rolls())


@pytest.mark.parametrize(
    "method, words",
    [
        (Mine, r"expected an object of a Method: write Mine\(\), with brackets"),
        ("sft", "method is 'sft', expected an object of a Method"),
    ],
)
def test_what_is_no_method(config, method, words):
    with pytest.raises(TypeError, match=words):
        tandem.train(tandem.load(config), method=method)


def test_a_method_of_another_process_can_be_looked_at_and_not_trained(config):
    """tandem eval and doctor of its run folder need no method."""
    block = {"name": "Elsewhere (object)", "object": 10**6, "code": "", "options": {}}
    assert isinstance(configured(block), Absent)
    loaded = replace(tandem.load(config, method=Mine()), method=block)
    with pytest.raises(tandem.ConfigError, match=r"was made in Python.*train\(config, method="):
        tandem.train(loaded)


def test_each_run_starts_with_the_state_it_was_given():
    block = give(Mine(seen=[5]))
    first, second = configured(block), configured(block)
    first.seen.append(6)
    assert second.seen == [5]


def test_every_config_carries_its_own_object(config):
    """A sweep in a notebook: all are loaded, then all are trained."""
    method = Mine(scale=3.0)
    configs = [tandem.load(config, method=Mine(scale=scale)) for scale in (1.0, 2.0)]
    configs.append(tandem.load(config, method=method))
    method.scale = 9.0  # after it was given
    assert [configured(one.method).scale for one in configs] == [1.0, 2.0, 3.0]


def test_options_called_as_keys_of_a_block_are(config):
    @dataclass
    class Named(Mine):
        name: str = "psft"
        code: str = "mine"

    found = configured(tandem.load(config, method=Named()).method)
    assert type(found) is Named and (found.name, found.code) == ("psft", "mine")


def test_overrides_of_its_options_are_refused(config):
    with pytest.raises(tandem.ConfigError, match=r"'method.scale=5.0' sets an option.*object"):
        tandem.load(config, ["method.scale=5.0"], method=Mine())


@pytest.mark.whole_run
def test_a_resume_with_other_code_is_refused(tmp_path, config, monkeypatch):
    assert tandem.train(tandem.load(config), method=Mine()) == 0
    monkeypatch.setattr("tandem.algorithms.given.digest_of", lambda cls: "another")
    longer = tandem.load(config, ["run.steps=3", "run.resume=true"])
    with pytest.raises(tandem.ConfigError, match=r"method\.code"):
        tandem.train(longer, method=Mine())


class Kind(IntEnum):
    ONE = 1


def test_ordinary_values_of_notebooks_can_be_told():
    @dataclass
    class Odd(Mine):
        values: dict = field(default_factory=dict)
        late: float = field(init=False)

    values = {
        "rate": np.float64(0.5),
        "list": [np.int64(3), Kind.ONE],
        ("a", 1): float("nan"),
        "array": np.arange(5000),
        "tensor": torch.ones(2),
        "code": len,
        "reference": "${HOME}",
    }
    found = options_of(Odd(values=values))
    assert yaml.safe_load(yaml.safe_dump(found)) == found and "late" not in found
    told = found["values"]
    assert (told["rate"], told["list"], told["('a', 1)"]) == (0.5, [3, 1], "nan")
    assert told["code"] == "a builtin_function_or_method" and told["reference"] == "${HOME}"
    other = options_of(Odd(values={**values, "array": np.arange(5000)[::-1]}))
    assert other["values"]["array"] != told["array"], "by content"


def test_what_cannot_be_copied_says_so():
    with pytest.raises(TypeError, match=r"Mine cannot be copied \(TypeError.*works on a copy"):
        give(Mine(seen=[threading.Lock()]))
