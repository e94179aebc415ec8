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
    Source,
    Trajectory,
)
from tandem.engine.learner.by_hand import trajectory
from tandem.engine.learner.inspect import Inspection
from tandem.engine.loop.reporter import latest_signals
from tandem.engine.loop.waves import joined, next_wave
from tandem.launch.method_contract.batches import NO_COLUMNS, Letters, described, ids, look

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
    signals, tickets, record = dict(carried.signals), dict(carried.tickets), []
    for step in steps:
        for distance in probes:
            method.demand(max(0, step + distance), budget, {"reward/mean": 0.9, "entropy": 2.0})
        for ahead in range(step, min(step + staleness, budget.steps - 1) + 1):
            if ahead not in tickets:
                demand = check_demand(method, method.demand(ahead, budget, signals), budget.sources)
                method.commit(ahead, demand, signals)
                tickets[ahead] = (demand, first_wave(method, demand, ahead, budget, columns))
        demand, asked = tickets.pop(step)
        groups = []
        for answered in asked:
            if probes:
                method.again(answered.group, 1, answered.request, budget)
            groups.append(after_waves(method, answered, step, budget, columns))
        made = Batch(
            step,
            tuple(g for g in groups if check_accept(method, method.accept(g))),
            demonstrations_of(method, demand, step),
            signals,
            off_policy=staleness > 0,
            budget=budget,
        )
        out = look(method, made, ids, columns=columns)
        metrics = {
            "grad_norm": math.sqrt(sum(float((g**2).sum()) for g in every_gradient(out))),
            "entropy": 0.3 + 0.01 * step,
        }
        for name, value in out.terms.items():
            if any(name in row.weights for row in out.rows):
                metrics[f"loss/{name}"] = value
        if groups:
            metrics["reward/mean"] = float(np.mean([g.rewards.mean() for g in groups]))
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
    method: Method, demand: Demand, step: int, budget: Budget, columns: Mapping[str, Any]
) -> list[Answered]:
    """The groups of a step as they are first sampled."""
    demonstrated = demand.by_source.get(DEFAULT_SOURCE, 0) if method.prompts_from_experts else 0
    found = []
    for i in range(demand.prompts):
        number = step * 100 + i
        rng = np.random.default_rng([1, number])
        response = np.append(rng.integers(4, 20, rng.integers(3, 8)), 3).astype(np.int32)
        prompt = Prompt(
            f"p{number}",
            np.array([1, 2], np.int32),
            "ab",
            columns,
            response if i < demonstrated else None,
        )
        request = method.request(number, prompt, Sampling(8, seed=number), step, budget)
        check_request(method, request)
        found.append(Answered(request, answer(method, request, step, columns)))
    return found


def after_waves(
    method: Method, answered: Answered, step: int, budget: Budget, columns: Mapping[str, Any]
) -> ScoredGroup:
    """The group once the method does not ask again."""
    request, group = answered
    while (asked := next_wave(method, group, request, budget)) is not None:
        request = asked
        group = joined(group, answer(method, request, step, columns), method.waves_join)
    return group


def answer(
    method: Method, request: GenRequest, step: int, columns: Mapping[str, Any]
) -> ScoredGroup:
    prompt = request.prompt
    rng = np.random.default_rng([1, request.group, 1 + request.wave])
    found = []
    for prefix in request.prefixes or [()] * request.samples:
        new = rng.integers(4, 20, rng.integers(1, 6))
        source = np.repeat(
            np.array([Source.PROMPT, request.prefix_source, Source.POLICY], np.int8),
            [len(prompt.tokens), len(prefix), len(new)],
        )
        sampled = source == Source.POLICY
        found.append(
            Trajectory(
                prompt.id,
                np.concatenate([prompt.tokens, prefix, new]).astype(np.int32),
                source,
                Finish.STOP,
                np.where(sampled, -0.2, np.nan).astype(np.float32),
                np.where(sampled, step, -1).astype(np.int32),
                request.group,
                request.wave,
            )
        )
    rewards = (rng.random(len(found)) < 0.3).astype(np.float32) * (rng.random() < 0.6)
    scored = prompt.demonstration is not None and method.scores_demonstrations
    made = ScoredGroup(
        request.group,
        prompt,
        tuple(found),
        rewards,
        demonstration_reward=1.0 if scored else None,
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
    response = [*rng.integers(4, 20, rng.integers(2, 7)), 3]
    return trajectory([1, 2], response, expert=True, prompt_id=f"d{step}.{i}")
