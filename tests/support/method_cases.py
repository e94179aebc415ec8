"""What the contract of a method is checked on (hand-made batches, and a loop that drives a method
for some steps), with values computed by hand and names for what tests ask of it.
"""

import math

import numpy as np

from tandem.algorithms.rows import demonstration
from tandem.engine.core.types import ScoredGroup, Trajectory
from tandem.launch.method_contract.batches import (
    EXPERTS,
    aligned,
    batch,
    forced,
    ids,
    look,
    ramp,
    rollouts,
    without_rollouts,
)
from tandem.launch.method_contract.driving import BUDGET, drive

__all__ = [
    "BUDGET",
    "EXPERTS",
    "aligned",
    "batch",
    "drive",
    "forced",
    "ids",
    "look",
    "ramp",
    "rollouts",
    "without_rollouts",
]

# of EXPERTS under `ramp`: five tokens at positions 2, 3, 4 and 1, 2
SFT_LOSS = (0.3 + 0.4 + 0.5 + 0.2 + 0.3) / 5
# GRPO's advantage of rewards 1, 0: mean 1/2, unbiased std sqrt(1/2)
A = 0.5 / (math.sqrt(0.5) + 1e-6)
# of `rollouts()`: three tokens with A, one with -A
GRPO_LOSS = -(3 * A - A) / 4


def constant(value):
    return lambda row: np.full(len(row.tokens), value, np.float32)


def half(row):
    return constant(math.log(0.5))(row)


def by_source(out, source) -> list[np.ndarray]:
    """The gradients of the rows that have tokens of `source`."""
    return [
        g for g, row in zip(out.gradients, out.rows, strict=True) if (row.source == source).any()
    ]


def commit(method, step, signals):
    """The demand of a step that is going to be made."""
    demand = method.demand(step, BUDGET, signals)
    method.commit(step, demand, signals)
    return demand


def kind_of(demand) -> str:
    """rl: a step with rollouts; sft: one without."""
    return "rl" if demand.prompts else "sft"


def as_expert(g: ScoredGroup) -> Trajectory:
    """The group's demonstration as an ordinary one of the expert stream."""
    return demonstration(g)
