"""The learning rate of a step against its formula, written out anew."""

import math

import pytest

from tandem.algorithms.base import Demand
from tandem.engine.config.schema import Config, LearnerConfig, RunConfig
from tandem.engine.learner.learning_rate import learning_rate


def formula(kind, base, steps, warmup, step, taken):
    ramp = (taken + 1) / warmup if taken < warmup else 1.0
    done = max(0, step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return base * ramp * shape[kind]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps, warmup", [(7, 0), (7, 3), (3, 3), (2, 5)])
def test_warm_up_then_schedule_to_the_bit(kind, steps, warmup):
    config = Config(
        run=RunConfig(steps=steps),
        learner=LearnerConfig(learning_rate=3e-4, schedule=kind, warmup_steps=warmup),
    )
    for step in range(steps):
        found = learning_rate(config, Demand(), step, taken=step)
        assert found == formula(kind, 3e-4, steps, warmup, step, step)


def test_each_set_of_moments_warms_up_and_a_demand_brings_its_own_rate():
    config = Config(
        run=RunConfig(steps=10), learner=LearnerConfig(learning_rate=1.0, warmup_steps=4)
    )
    rates = [learning_rate(config, Demand(optimizer="sft"), 8, taken) for taken in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(config, Demand(learning_rate=0.5), 8, taken=1) == 0.25
