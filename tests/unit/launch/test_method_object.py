"""A method made in Python, in the place of the config's: tandem.train(config, method=...)."""

import json
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import yaml

import tandem
from tandem.algorithms.registry import configured, give


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
    assert written == {"name": "Mine (object)", "scale": 3.0, "seen": []}

    longer = ["run.steps=3", "run.resume=true"]
    assert tandem.train(tandem.load(config, longer, method=method)) == 0
    assert [line["mine/steps"] for line in metrics(tmp_path)] == [1.0, 2.0, 3.0]
    with pytest.raises(tandem.ConfigError, match=r"method\.scale"):
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


def test_a_name_from_another_process_says_where_it_came_from():
    with pytest.raises(ValueError, match=r"was made in Python.*tandem.train\(config, method="):
        configured({"name": "Elsewhere (object)"})


def test_each_run_starts_with_the_state_it_was_given():
    block = give(Mine(seen=[5]))
    first, second = configured(block), configured(block)
    first.seen.append(6)
    assert second.seen == [5]
