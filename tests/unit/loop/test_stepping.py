"""Demand.updates and Demand.stop, as far as update and producer go."""

import numpy as np
import pytest
from method_cases import EXPERTS, batch

from tandem.algorithms.base import Budget, Demand, Method
from tandem.algorithms.checks.method import check_demand
from tandem.algorithms.registry import make_method
from tandem.engine.config.schema import Config, LearnerConfig
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import Sampling, StepReport
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.update import Work, update

CONFIG = Config(learner=LearnerConfig(updates_per_batch=3, epochs_per_batch=2))


class Recorder:
    """A learner that notes its plans. Every log-prob is -1."""

    ranks, shares_prompts = 1, False

    def __init__(self):
        self.plans = []

    def logprobs(self, rows, temperature, model="policy"):
        return [np.full(len(row.tokens), -1.0, np.float32) for row in rows]

    def step(self, plan):
        self.plans.append(plan)
        return StepReport({"loss": 0.0})


def plans(demand: Demand) -> list:
    """The optimizer steps on three demonstrations, with 3 x 2 updates in the config."""
    method, learner = make_method("sft", {}), Recorder()
    b = batch(groups=(), experts=(EXPERTS * 2)[:3])
    update(learner, CONFIG, method, Work(4, demand, method.rows(b), method.terms(b), 1.0, 1e-3))
    return learner.plans


def old_logps(plan) -> list:
    return [micro.streams.get("old_logp") for rank in plan.micro_batches for micro in rank]


@pytest.mark.parametrize(
    "demand, steps",
    [
        (Demand(experts=3), 1),
        (Demand(experts=3, updates=1), 1),
        (Demand(experts=3, updates=2), 2),
        (Demand(experts=3, updates=9), 3),  # no part is empty
        (Demand(prompts=3), 6),
        (Demand(prompts=3, updates=3), 3),
    ],
)
def test_the_method_says_how_many_updates_a_batch_has(demand, steps):
    found = plans(demand)
    assert len(found) == steps
    trained = sum(plan.denominators["sft"] for plan in found)
    whole = plans(Demand(experts=3))[0].denominators["sft"]
    assert trained == whole * (2 if steps == 6 else 1), "each row once in a pass"


def test_several_updates_know_the_policy_before_the_first():
    (one,) = plans(Demand(experts=3, updates=1))
    assert old_logps(one) == [None]
    for plan in plans(Demand(experts=3, updates=3)):
        assert all((old == -1).all() for old in old_logps(plan))


@pytest.mark.parametrize("wrong", [{"updates": 0}, {"updates": 1.5}, {"stop": True}])
def test_a_wrong_demand_is_told(wrong):
    (name,) = wrong
    with pytest.raises(MethodError, match=f"Method: demand\\(\\).*{name}="):
        check_demand(Method(), Demand(prompts=1, **wrong))


class StopsAt(Method):
    def __init__(self, last: int, prompts: int):
        self.last, self.prompts, self.asked = last, prompts, []

    def demand(self, step, budget, signals):
        self.asked.append(step)
        if step >= self.last:
            return Demand(prompts=self.prompts, stop="enough")
        return Demand(experts=1)


def producer(method, staleness):
    method.uses_experts = True
    return Producer(
        method=method,
        prompts=None,
        pool=None,
        scorer=None,
        budget=Budget(1, 1, 1, 10),
        sampling=Sampling(4),
        staleness=staleness,
        seed=0,
        restart_and_sync=lambda: None,
    )


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_step_is_asked_for_after_the_last(staleness):
    """Nor by a run that goes on from a checkpoint in which the end is decided."""
    method = StopsAt(4, prompts=0)
    whole = producer(method, staleness)
    for step in range(5):
        assert not whole.wants_weights(step, {})
        whole.request_ahead(step, {})
        if step == 2:
            saved = whole.state_dict()
        assert bool(whole.collect(step).demand.ends_before) == (step == 4)
    assert not whole.wants_weights(5, {}) and max(method.asked) == 4

    resumed = producer(StopsAt(4, prompts=0), staleness)
    resumed.load_state_dict(saved)
    for step in range(2, 5):
        resumed.request_ahead(step, {})
        demand = resumed.collect(step).demand
    assert demand.stop == "enough" and max(resumed.method.asked, default=4) == 4


def test_the_prompts_of_a_last_step_want_weights():
    assert producer(StopsAt(1, prompts=2), 1).wants_weights(0, {})
    assert not producer(StopsAt(1, prompts=2), 0).wants_weights(0, {})
