"""What a method hands over beside rows and terms: demand, request, accept, metrics, state. And
whole runs of methods that are wrong: one screen, the right exit code."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from wrong_cases import Right, wrong

from tandem.algorithms.base import Demand
from tandem.algorithms.checks.method import (
    check_accept,
    check_demand,
    check_metrics,
    check_request,
    check_state,
)
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.registry import make_method
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import GenRequest, Prompt, Sampling


@pytest.mark.parametrize(
    "demand, words",
    [
        (None, "demand.. returned None.*does it end without"),
        ({"prompts": 3}, "demand.. returned a dict"),
        (Demand, "returned the class Demand"),
        (Demand(prompts=-1), "prompts=-1"),
        (Demand(experts=1.5), "experts=1.5"),
        (Demand(learning_rate=float("nan")), "learning_rate=nan, expected a finite number"),
        (Demand(learning_rate=float("inf")), "learning_rate=inf"),
        (Demand(learning_rate=-1e-3), "learning_rate=-0.001"),
        (Demand(learning_rate="1e-3"), "learning_rate='1e-3'"),
        (Demand(learning_rate=Schedule("constant", 1.0)), "learning_rate=Schedule.*becomes"),
    ],
)
def test_demand(demand, words):
    with pytest.raises(MethodError, match=words):
        check_demand(Right(), demand)


def test_demands_of_numpy():
    demand = Demand(np.int64(2), np.int32(0), learning_rate=np.float32(1e-3))
    assert check_demand(Right(), demand) is demand


def test_rollouts_of_a_method_that_has_none():
    with pytest.raises(MethodError, match="2 prompts, but the method's uses_rollouts is False"):
        check_demand(wrong(uses_rollouts=False), Demand(prompts=2))


def test_demonstrations_of_a_method_that_reads_none():
    with pytest.raises(MethodError, match="uses_experts is False"):
        check_demand(wrong(uses_experts=False), Demand(experts=2))
    assert (
        check_demand(
            wrong(uses_experts=False, prompts_from_experts=True), Demand(experts=2)
        ).experts
        == 2
    )


def request(**parts):
    prompt = Prompt("p", np.array([1], np.int32), "")
    asked = GenRequest(group=0, prompt=prompt, samples=2, sampling=Sampling(max_tokens=4))
    return replace(asked, **parts)


@pytest.mark.parametrize(
    "check, value, words",
    [
        (check_request, None, "request.. returned None"),
        (check_accept, None, "accept.. returned None"),
        (check_metrics, None, "metrics.. returned None"),
        (check_request, request(samples=-1), "samples=-1"),
        (check_request, request(samples=2.0), "samples=2.0"),
        (check_request, request(prefixes=(np.array([1]),)), "1 prefixes for 2 samples"),
        (check_accept, "no", "accept.. returned 'no'"),
        (check_accept, np.array([True, False]), "a ndarray of several values.*any.. or .all"),
        (check_metrics, {"a": "high"}, "'a' is 'high'"),
        (check_metrics, {"a": "0.5"}, "'a' is '0.5'"),
        (check_metrics, {"a": np.ones(3)}, "'a' is array"),
        (check_metrics, {"a": 10**400}, "'a' is 1000"),
        (check_metrics, {"step": 3}, "'step', a name that metrics.jsonl has for something else"),
        (check_metrics, {"eval/accuracy": 3}, "choose another, e.g. 'my/eval/accuracy'"),
    ],
)
def test_other_answers(check, value, words):
    with pytest.raises(MethodError, match=words):
        check(Right(), value)


def test_metrics_of_other_libraries():
    given = {"a": np.float32(0.5), "b": torch.tensor(0.5, requires_grad=True), "c": True}
    found = check_metrics(Right(), given)
    assert found == {"a": 0.5, "b": 0.5, "c": 1.0}
    assert {type(value) for value in found.values()} == {float}


def test_state_that_would_be_lost():
    with pytest.raises(MethodError, match=r"state_dict.. returned None"):
        check_state(wrong(state_dict=lambda self: None))
    for value in (lambda: 3, (i for i in range(3))):
        method = wrong(state_dict=lambda self, value=value: {"mine": value})
        with pytest.raises(MethodError, match=r"'mine' is a .* cannot be pickled"):
            check_state(method)
    check_state(Right())


LATE = """from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from tandem.algorithms.base import Method

if TYPE_CHECKING:
    from pathlib import Path

@dataclass
class Mine(Method):
    where: Path | None = None
    def rows(self, batch): ...
    def terms(self, batch): ...
"""


def test_an_annotation_that_is_not_there_when_options_are_read(tmp_path):
    path = tmp_path / "late.py"
    path.write_text(LATE)
    with pytest.raises(ValueError, match=r"Mine: an annotation .* names 'Path'.*TYPE_CHECKING"):
        make_method(f"{path}:Mine", {"where": "x"})


RUN = """
from dataclasses import dataclass, replace
from typing import ClassVar
from tandem.algorithms.base import Method, Term
from tandem.algorithms.rows import expert_row
from tandem.algorithms.parts.objectives.nll import NLL

class Column:
    def __call__(self, tokens):
        return -tokens.logp[:, None], {}

class Exits:
    def __call__(self, tokens):
        raise SystemExit(0)

@dataclass
class Mine(Method):
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False
    objective: str = "right"
    shift: int = 0
    def rows(self, batch):
        rows = [expert_row(t, "sft") for t in batch.experts]
        return [replace(row, tokens=row.tokens + self.shift) for row in rows]
    def terms(self, batch):
        objective = {"column": Column(), "exits": Exits(), "right": NLL()}[self.objective]
        return [Term("sft", objective), Term("unused", NLL())]
"""


@pytest.mark.whole_run
def test_a_run_ends_in_its_first_step_on_one_screen(tmp_path, capsys):
    from tandem.launch.cli import main

    (tmp_path / "mine.py").write_text(RUN)
    config = tmp_path / "c.yaml"
    config.write_text(f"""
mode: inline
model: {{path: "tandem:tiny"}}
data:
  experts: {{path: "task:sort", options: {{digits: 3, size: 8}}}}
  experts_per_step: 4
  max_expert_tokens: 16
  max_prompt_tokens: 32
method: {{name: "{tmp_path}/mine.py:Mine"}}
run: {{dir: "{tmp_path}", steps: 2, save_model: false}}
""")
    assert main(["train", str(config), "run.name=wrong", "method.objective=column"]) == 2
    told = capsys.readouterr()
    assert (
        "method Mine, term 'sft': its objective: its loss has shape" in told.err
        and "Traceback" not in told.err
    )
    assert main(["train", str(config), "run.name=exits", "method.objective=exits"]) == 1
    told = capsys.readouterr()
    assert "ended the process with exit(0)" in told.err and "mine.py" in told.err
    assert main(["train", str(config), "run.name=token", "method.shift=100000"]) == 2
    assert "method Mine, a row has the token 1000" in capsys.readouterr().err
    assert main(["train", str(config), "run.name=right"]) == 0
    assert "no row ever had a token of the method's term(s) unused" in capsys.readouterr().out
