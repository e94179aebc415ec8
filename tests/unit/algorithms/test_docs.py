"""docs/methods.md: its example method is the file beside it and trains, its snippet says what it
prints, its tables name what there is.
"""

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from method_cases import EXPERTS, GRPO_LOSS, SFT_LOSS, batch, half, look, ramp

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.demos import OBJECTIVES
from tandem.algorithms.parts.policy import PRESETS
from tandem.algorithms.parts.schedules import KINDS
from tandem.algorithms.registry import METHODS, make_method, method_class
from tandem.launch.check_config import load
from tandem.launch.run.run import train

DOCS = Path(__file__).parents[3] / "docs"
PAGE = (DOCS / "methods.md").read_text()
EXAMPLE = DOCS / "examples" / "my_method.py"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def test_the_page_shows_the_example_as_it_is():
    assert EXAMPLE.read_text() in BLOCKS and len(EXAMPLE.read_text().splitlines()) <= 60


def test_the_example_by_hand():
    """(1 - 1/2)^2 = 1/4 on five tokens; without SFT it is GRPO, with k = 0 plain SFT."""

    def make(**options):
        return make_method(f"{EXAMPLE}:FocalMix", options)

    out = look(make(mu=1.0), Batch(0, (), EXPERTS), half)
    np.testing.assert_allclose(out.gradients[0], [0, 0, -0.05, -0.05, -0.05], rtol=1e-6)
    assert look(make(mu=0.0), batch(), ramp).loss == pytest.approx(GRPO_LOSS, rel=1e-5)
    assert look(
        make(mu={"kind": "reward_gap", "peak": 0.5}, k=0), batch(signals={"reward/mean": 0.3}), ramp
    ).loss == pytest.approx(0.8 * GRPO_LOSS + 0.2 * SFT_LOSS, rel=1e-5)


@pytest.mark.whole_run
def test_the_example_trains(tmp_path):
    small = {"digits": 3}
    config = {
        "mode": "inline",
        "model": {"path": "tandem:tiny"},
        "reward": {"functions": ["exact"]},
        "learner": {"learning_rate": 1e-3},
        "data": {
            "prompts": {"path": "task:sort", "options": small},
            "experts": {"path": "task:sort", "options": {**small, "size": 8}},
            "experts_per_step": 4,
            "max_prompt_tokens": 32,
            "max_expert_tokens": 16,
        },
        "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 5},
        "run": {"steps": 2, "save_model": False, "dir": str(tmp_path)},
        "method": {
            "name": f"{EXAMPLE}:FocalMix",
            "k": 1.5,
            "mu": {"kind": "reward_gap", "peak": 0.5},
            "policy": "rloo",
        },
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert train(load(tmp_path / "c.yaml")) == 0
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [line["loss/expert"] for line in steps if "loss/expert" in line]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_the_snippet_says_what_it_prints(capsys):
    code = next(block for block in BLOCKS if "inspect(" in block)
    exec(compile(code, "docs/methods.md", "exec"), names := {})
    out, printed = names["out"], capsys.readouterr().out
    assert out.loss == pytest.approx(
        0.75 * out.terms["policy"] + 0.25 * out.terms["expert"]
    ) and out.terms["expert"] == pytest.approx(math.log(2))
    assert str(out.terms["policy"])[:7] == "-0.3535" and "{'policy': 4.0, 'expert': 2.0}" in printed
    assert out.gradients[2].tolist() == [0, 0, -0.125, -0.125]


def test_tables_name_every_method_kind_and_preset():
    rows = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    assert {
        name
        for name in METHODS
        if method_class(name).__module__.split(".")[-1] not in ("ppo", "reft")
    } <= rows
    for kind in KINDS:
        assert f"`{kind}`" in PAGE
    for preset in PRESETS:
        assert f"`{preset}`" in PAGE
    assert set(OBJECTIVES) <= rows


@pytest.mark.parametrize("name", METHODS)
def test_every_file_says_what_it_does_and_stays_short(name):
    cls = method_class(name)
    path = Path(inspect.getfile(cls))
    text = path.read_text()
    assert (
        len(text.splitlines()) <= 130
        and text.startswith('"""')
        and cls.title
        and dataclasses.is_dataclass(cls)
    )
    assert "Source:" in text.split('"""')[1] or "arXiv" in text.split('"""')[1]


@pytest.mark.parametrize("name", ["sasr", "srft", "prefix_rft", "uft", "visurf"])
def test_what_is_not_verified_stays_marked(name):
    assert "UNVERIFIED" in Path(inspect.getfile(method_class(name))).read_text().split('"""')[1]
    assert re.search(rf"^\| `{name}` \|", PAGE.split("**Not verified.**")[1], re.M)
