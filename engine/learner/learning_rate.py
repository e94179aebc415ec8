"""The learning rate of a step."""

from __future__ import annotations

from tandem.algorithms.base import Demand
from tandem.algorithms.parts.schedules import Schedule
from tandem.engine.config.schema import Config


def learning_rate(config: Config, demand: Demand, step: int, taken: int) -> float:
    """Linear warm-up over the first steps of every set of optimizer moments (fresh moments step at
    full size in every direction), then the config's schedule over the steps of the run.

    `taken` counts the steps that the demand's set of moments has taken.
    """
    learner = config.learner
    rate = learner.learning_rate if demand.learning_rate is None else demand.learning_rate
    if taken < learner.warmup_steps:
        rate *= (taken + 1) / learner.warmup_steps
    after_warmup = max(1, config.run.steps - learner.warmup_steps)
    shape = Schedule(learner.schedule, peak=1.0, decay=after_warmup)
    return rate * shape(max(0, step - learner.warmup_steps))
