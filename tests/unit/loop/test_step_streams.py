"""What is known of a step's rows before the update: at the step's one temperature, and only of rows
that a term wants to know it of."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest
from method_cases import EXPERTS, batch, rollouts

from tandem.algorithms.base import Demand, Method, Term
from tandem.algorithms.checks.rows import check_row, check_rows
from tandem.algorithms.parts.objectives.entropy import KLToReference
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.policy import PPOClip
from tandem.algorithms.registry import make_method
from tandem.algorithms.rows import expert_row
from tandem.engine.config.schema import Config, LearnerConfig, RolloutConfig
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import StepReport
from tandem.engine.loop.streams import with_streams
from tandem.engine.loop.update import Work, step_temperature, update
from tandem.launch.check_config import load


class Recorder:
    """A learner that notes which rows it was asked about, and at which temperature. Every log-prob
    is -1."""

    ranks, shares_prompts = 1, False

    def __init__(self):
        self.asked, self.plans = [], []

    def compute_streams(self, rows, temperature, quantities=None):
        self.asked.append(("policy", [row.prompt_id for row in rows], temperature))
        return {
            "logp": [np.full(len(row.tokens), -1.0, np.float32) for row in rows],
            "value": [np.full(len(row.tokens), 0.5, np.float32) for row in rows],
        }

    def logprobs(self, rows, temperature, model="policy"):
        self.asked.append((model, [row.prompt_id for row in rows], temperature))
        return [np.full(len(row.tokens), -1.0, np.float32) for row in rows]

    def step(self, plan):
        self.plans.append(plan)
        return StepReport({"loss": 0.0})


def stepped(method, b, **options):
    """(rows with their streams, the recorder) of what the loop does with the method's rows."""
    config = Config(rollout=RolloutConfig(temperature=0.7), learner=LearnerConfig(**options))
    learner = Recorder()
    demand = Demand(prompts=len(b.groups), experts=len(b.experts))
    temperature = step_temperature(config, demand)
    terms = method.terms(b)
    rows = method.credit(with_streams(learner, method.rows(b), terms, temperature), b)
    update(learner, config, method, Work(0, demand, rows, terms, temperature, 1e-3))
    return rows, learner


def test_a_step_of_demonstrations_asks_nothing_of_the_reference():
    """SASR with a KL term: its rollout steps need the reference, its SFT steps do not."""
    method = make_method("sasr", {"policy": {"kl": 0.1}})
    rows, learner = stepped(method, batch(groups=()))
    assert learner.asked == [] and all("ref_logp" not in row.streams for row in rows)
    rows, learner = stepped(method, batch(experts=()))
    assert learner.asked == [("reference", ["p", "p"], 0.7)] and all(
        "ref_logp" in row.streams for row in rows
    )


def test_only_rows_of_the_term_are_asked_about():
    """CHORD with a KL: two rollouts beside two demonstrations. With a critic the same for old
    log-probs and values."""
    rows, learner = stepped(make_method("chord_mu", {"policy": {"kl": 0.1}}), batch())
    assert learner.asked == [("reference", ["p", "p"], 0.7)]
    assert ["ref_logp" not in row.streams for row in rows] == [False, False, True, True]
    rows, learner = stepped(
        make_method("chord_mu", {"policy": {"preset": "ppo", "critic": {"kl": 0.1}}}), batch()
    )
    assert learner.asked == [("policy", ["p", "p"], 0.7), ("reference", ["p", "p"], 0.7)]
    assert ["old_value" not in row.streams for row in rows] == [False, False, True, True]
    assert ["returns" not in row.streams for row in rows] == [False, False, True, True]


def test_a_row_that_trains_nothing_is_not_asked_about():
    cut = rollouts((0, 1), finish="length", number=1)
    method = make_method("grpo", {"policy": {"kl": 0.1, "mask_truncated": True}})
    rows, learner = stepped(method, batch(groups=[rollouts(), cut], experts=()))
    assert learner.asked == [("reference", ["p", "p"], 0.7)] and "ref_logp" not in rows[2].streams


def test_several_updates_score_only_what_is_not_known_yet():
    """The critic's step scored the rollouts already; an old log-prob of the method's is kept."""
    method = make_method("chord_mu", {"policy": {"preset": "ppo", "critic": {"kl": 0.1}}})
    _, learner = stepped(method, batch(), updates_per_batch=2)
    assert learner.asked[2:] == [("policy", ["e0", "e1"], 0.7)]
    method.rows = lambda b: [
        expert_row(t, "expert").with_streams(old_logp=np.zeros(len(t.tokens), np.float32))
        for t in EXPERTS
    ]
    _, learner = stepped(method, batch(), updates_per_batch=2)
    assert learner.asked == []


def own_scores(stream, value):
    """Rows and terms of CHORD's with a KL and a clip, the first row with a stream of its own."""
    method = make_method("chord_mu", {"policy": {"preset": "ppo", "critic": {"kl": 0.1}}})
    b = batch()
    first, *others = method.rows(b)
    rows = [first.with_streams(**{stream: value}), *others]
    return method, rows, method.terms(b)


@pytest.mark.parametrize("stream", ["ref_logp", "old_logp", "old_value"])
def test_a_row_that_brings_its_own_scores_keeps_them(stream):
    method, rows, terms = own_scores(stream, -3.5)
    learner = Recorder()
    found = with_streams(learner, check_rows(method, rows, terms), terms, 0.7)
    assert (found[0].streams[stream] == -3.5).all()
    assert (found[1].streams[stream] != -3.5).all()
    asked = {model: names for model, names, _ in learner.asked}
    assert len(asked["reference"]) == 2 - (stream == "ref_logp")
    assert set(found[0].streams) == set(found[1].streams)


def test_a_model_that_all_rows_bring_the_scores_of_is_not_asked():
    terms = [Term("sft", NLL(), needs=frozenset({"logp:teacher"}))]
    rows = [expert_row(t, "sft").with_streams(**{"logp:teacher": -2.0}) for t in EXPERTS]
    learner = Recorder()
    assert with_streams(learner, rows, terms, 1.0) == rows and learner.asked == []


def test_a_row_with_scores_behind_a_view_needs_no_view():
    _, rows, _ = own_scores("logp:teacher@informed", -2.0)
    terms = [Term("policy", NLL(), needs=frozenset({"logp:teacher@informed"}))]
    check_row("here", replace(rows[0], weights={"policy": rows[0].weights["policy"]}), terms)
    with pytest.raises(MethodError, match="the row has no view 'informed'"):
        check_row("here", replace(rows[1], weights={"policy": rows[1].weights["policy"]}), terms)


def test_own_scores_with_a_gap_are_refused():
    method, rows, terms = own_scores("ref_logp", np.nan)
    with pytest.raises(MethodError, match=r"row 0 .*\['ref_logp'\] is NaN at token"):
        check_rows(method, rows, terms)


def test_a_quantity_is_asked_for_where_a_term_that_wants_it_has_a_token():
    """Demonstrations that draw: an update without one has no draws to make anything of."""
    method = make_method("rl_with_sft", {"demos": "one_token"})
    for experts, expected in (((), False), (EXPERTS, True)):
        _, learner = stepped(method, batch(experts=experts))
        assert [bool(plan.quantities) for plan in learner.plans] == [expected]
    b = batch(groups=[rollouts(), rollouts(number=1)], experts=EXPERTS[:1])
    _, learner = stepped(method, b, updates_per_batch=2)
    assert sorted(bool(plan.quantities) for plan in learner.plans) == [False, True]


@dataclass
class OnDemonstrations(Method):
    """A clipped ratio and a KL on demonstrations, in steps without rollouts."""

    title: ClassVar[str] = "test"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False

    def rows(self, batch):
        rows = [expert_row(t, "sft") for t in batch.experts]
        for row in rows:
            row.weights["kl"] = row.weights["sft"].copy()
            row.weights["ratio"] = row.weights["sft"].copy()
        return [row.with_streams(advantage=row.weights["sft"]) for row in rows]

    def terms(self, batch):
        return [
            Term("sft", NLL()),
            Term("kl", KLToReference(), needs=frozenset({"ref_logp"})),
            Term("ratio", PPOClip(), coefficient=0.5, needs=frozenset({"old_logp"})),
        ]


@pytest.mark.parametrize("prompts, expected", [(0, 1.0), (2, 0.7)])
def test_the_update_has_the_temperature_of_the_scores(prompts, expected):
    b = batch(groups=[rollouts(number=i) for i in range(prompts)])
    _, learner = stepped(OnDemonstrations(), b)
    assert (
        {asked[2] for asked in learner.asked}
        == {plan.temperature for plan in learner.plans}
        == {expected}
    )


@pytest.mark.whole_run
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(tmp_path):
    """A whole run of a method of its own; rollouts would be sampled at 0.7."""
    from tandem.launch.run.run import train

    source = (
        "from dataclasses import dataclass, replace\n"
        "from typing import ClassVar\n"
        "from tandem.algorithms.base import Method, Term; from tandem.algorithms.rows import "
        "expert_row\n"
        "from tandem.algorithms.parts.objectives.nll import NLL; from "
        "tandem.algorithms.parts.objectives.entropy import KLToReference; from "
        "tandem.algorithms.parts.objectives.policy import PPOClip\n\n\n"
    )
    import inspect

    (tmp_path / "mine.py").write_text(source + inspect.getsource(OnDemonstrations))
    (tmp_path / "c.yaml").write_text(f"""
mode: inline
model: {{path: "tandem:tiny"}}
data:
  experts: {{path: "task:sort", options: {{digits: 3, size: 8}}}}
  experts_per_step: 4
  max_expert_tokens: 16
  max_prompt_tokens: 32
method: {{name: "{tmp_path}/mine.py:OnDemonstrations"}}
rollout: {{temperature: 0.7}}
learner: {{learning_rate: 1.0e-2}}
run: {{dir: "{tmp_path}", steps: 2, save_model: false}}
""")
    assert train(load(tmp_path / "c.yaml")) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    first, second = [line for line in lines if "grad_norm" in line]
    assert first["loss/kl"] == pytest.approx(0.0, abs=1e-9) and first[
        "ratio/ppo_kl"
    ] == pytest.approx(0.0, abs=1e-6)
    assert second["loss/kl"] > 1e-6 and second["ratio/ppo_kl"] == pytest.approx(0.0, abs=1e-6)
