"""A loop that drives a method for some steps as a run would, on random numbers that depend on the
step alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from tandem.algorithms.base import Batch, Budget, Demand, Method
from tandem.algorithms.checks.method import (
    check_accept,
    check_demand,
    check_metrics,
    check_request,
)
from tandem.engine.config.names import DEFAULT_SOURCE
from tandem.engine.core.types import (
    Finish,
    GenRequest,
    Prompt,
    Row,
    Sampling,
    ScoredGroup,
    Trajectory,
)
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.learner.inspect import Inspection
from tandem.engine.loop.reporter import latest_signals
from tandem.engine.loop.waves import joined, next_wave
from tandem.launch.method_contract.batches import NO_COLUMNS, Letters, described, ids, look
from tandem.rollout import trajectories

BUDGET = Budget(
    prompts=4,
    samples=4,
    experts=3,
    steps=100,
    seed=7,
    codec=Letters(),
    sources={"experts": 30, "general": 12},
)


class Driven(NamedTuple):
    """One step."""

    demand: Demand
    rows: list[Row]
    loss: float
    gradients: list[np.ndarray]  # by log-prob, float32 [T] for each row
    metrics: dict[str, float]


class Answered(NamedTuple):
    """A request and the group that answers it."""

    request: GenRequest
    group: ScoredGroup


@dataclass(frozen=True)
class Carried:
    """What a checkpoint of the run would hold beside the method's state."""

    signals: Mapping[str, float] = field(default_factory=dict)
    # of steps that were announced and are not made yet
    tickets: Mapping[int, tuple[Demand, list[Answered]]] = field(default_factory=dict)


def drive(
    method: Method,
    steps: Iterable[int],
    carried: Carried | None = None,
    budget: Budget = BUDGET,
    staleness: int = 0,
    probes: Sequence[int] = (),
    columns: Mapping[str, Any] = NO_COLUMNS,
) -> tuple[list[Driven], Carried]:
    """What a run does, from a start or from what was carried.

    `probes` are steps, counted from the present one, whose demand is asked for and not used, as is
    a second wave of every group.
    """
    carried = carried or Carried()
    signals = dict(carried.signals)
    tickets = dict(carried.tickets)
    record = []
    for step in steps:
        for distance in probes:
            probed = max(0, step + distance)
            method.demand(probed, budget, {"reward/mean": 0.9, "entropy": 2.0})
        last_ahead = min(step + staleness, budget.steps - 1)
        for ahead in range(step, last_ahead + 1):
            if ahead in tickets:
                continue
            demand = method.demand(ahead, budget, signals)
            demand = check_demand(method, demand, budget.sources)
            method.commit(ahead, demand, signals)
            asked = first_wave(method, demand, ahead, budget, columns)
            tickets[ahead] = (demand, asked)
        demand, asked = tickets.pop(step)
        groups = []
        for answered in asked:
            if probes:
                method.again(answered.group, 1, answered.request, budget)
            groups.append(after_waves(method, answered, step, budget, columns))
        accepted = []
        for g in groups:
            if check_accept(method, method.accept(g)):
                accepted.append(g)
        made = Batch(
            step,
            tuple(accepted),
            demonstrations_of(method, demand, step),
            signals,
            off_policy=staleness > 0,
            budget=budget,
        )
        out = look(method, made, ids, columns=columns)
        squares = [float((gradient**2).sum()) for gradient in every_gradient(out)]
        metrics = {
            "grad_norm": math.sqrt(sum(squares)),
            "entropy": 0.3 + 0.01 * step,
        }
        for name, value in out.terms.items():
            if any(name in row.weights for row in out.rows):
                metrics[f"loss/{name}"] = value
        if groups:
            means = [g.rewards.mean() for g in groups]
            metrics["reward/mean"] = float(np.mean(means))
        method.observe(step, metrics)
        metrics |= check_metrics(method, method.metrics(step))
        signals = latest_signals(signals, metrics)
        record.append(Driven(demand, out.rows, out.loss, out.gradients, metrics))
    return record, Carried(signals, tickets)


def every_gradient(out: Inspection) -> list[np.ndarray]:
    """Those of quantities too."""
    found = list(out.gradients)
    for gradients in out.extra_gradients.values():
        found.extend(gradients)
    return found


def first_wave(
    method: Method,
    demand: Demand,
    step: int,
    budget: Budget,
    columns: Mapping[str, Any],
) -> list[Answered]:
    """The groups of a step as they are first sampled."""
    demonstrated = 0
    if method.prompts_from_experts:
        demonstrated = demand.by_source.get(DEFAULT_SOURCE, 0)
    tokens = np.array([1, 2], np.int32)
    found = []
    for i in range(demand.prompts):
        number = step * 100 + i
        demonstration = drawn_response(number) if i < demonstrated else None
        prompt = Prompt(f"p{number}", tokens, "ab", columns, demonstration)
        sampling = Sampling(8, seed=number)
        request = method.request(number, prompt, sampling, step, budget)
        check_request(method, request)
        group = answer(method, request, step, columns)
        found.append(Answered(request, group))
    return found


def drawn_response(seed: int) -> np.ndarray:
    """int32: three to seven tokens and the end."""
    rng = np.random.default_rng([1, seed])
    length = rng.integers(3, 8)
    tokens = rng.integers(4, 20, length)
    return np.append(tokens, 3).astype(np.int32)


def after_waves(
    method: Method,
    answered: Answered,
    step: int,
    budget: Budget,
    columns: Mapping[str, Any],
) -> ScoredGroup:
    """The group once the method does not ask again."""
    request, group = answered
    while (asked := next_wave(method, group, request, budget)) is not None:
        request = asked
        wave = replace(answer(method, request, step, columns), waves=request.wave)
        group = joined(group, wave, method.waves_join)
    return group


def answer(
    method: Method,
    request: GenRequest,
    step: int,
    columns: Mapping[str, Any],
) -> ScoredGroup:
    prompt = request.prompt
    rng = np.random.default_rng([1, request.group, 1 + request.wave])
    found = []
    for prefix in trajectories.prefixes_of(request):
        length = rng.integers(1, 6)
        new = rng.integers(4, 20, length).astype(np.int32)
        logp = np.full(length, -0.2, np.float32)
        found.append(trajectories.trajectory(request, prefix, new, logp, step, Finish.STOP))
    right = rng.random(len(found)) < 0.3
    any_right = rng.random() < 0.6
    rewards = right.astype(np.float32) * any_right
    demonstration_reward = None
    if prompt.demonstration is not None and method.scores_demonstrations:
        demonstration_reward = 1.0
    made = ScoredGroup(
        request.group,
        prompt,
        tuple(found),
        rewards,
        demonstration_reward=demonstration_reward,
    )
    return described(made, columns)


def demonstrations_of(method: Method, demand: Demand, step: int) -> tuple[Trajectory, ...]:
    """Those that do not come with prompts, in the demand's order."""
    found: list[Trajectory] = []
    for name, count in demand.by_source.items():
        if name == DEFAULT_SOURCE and method.prompts_from_experts:
            continue
        for _ in range(count):
            made = demonstration_of(step, len(found))
            found.append(replace(made, dataset=name))
    return tuple(found)


def demonstration_of(step: int, i: int) -> Trajectory:
    rng = np.random.default_rng([2, step, i])
    length = rng.integers(2, 7)
    response = [*rng.integers(4, 20, length), 3]
    return trajectory([1, 2], response, expert=True, prompt_id=f"d{step}.{i}")
