"""From the rows of a step to new weights: one optimizer step per part of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.algorithms.base import Demand, Method, Term, quantities_of
from tandem.algorithms.checks.method import naming
from tandem.algorithms.checks.rows import has_tokens
from tandem.engine.config.schema import Config
from tandem.engine.core.types import NO_VERSION, Row, StepPlan, StepReport
from tandem.engine.learner.packing import pack
from tandem.engine.learner.protocol import Learner
from tandem.engine.learner.terms import denominators
from tandem.engine.loop.streams import with_old_logp


@dataclass(frozen=True, eq=False)
class Work:
    """What one step of the run trains."""

    step: int
    demand: Demand
    rows: Sequence[Row]
    terms: Sequence[Term]
    temperature: float
    learning_rate: float


def step_temperature(config: Config, demand: Demand) -> float:
    """The one temperature of a step, for scoring before the update, for the update and for the
    gate.

    Rollouts are trained on at the temperature they were sampled at. A step without any is plain
    SFT, at 1.
    """
    return config.rollout.temperature if demand.prompts else 1.0


def update(learner: Learner, config: Config, method: Method, work: Work) -> StepReport:
    """One optimizer step per part of the batch, in each epoch."""
    rows = work.rows
    if not any(row.trained.any() for row in rows):
        return StepReport({"empty": 1.0})
    parts = [rows]
    updates, epochs = updates_and_epochs(config, work.demand)
    if updates * epochs > 1:
        rows = with_old_logp(learner, rows, work.temperature)
        rng = np.random.default_rng([config.run.seed, work.step])
        parts = []
        for _ in range(epochs):
            parts.extend(split(rows, updates, rng))
    reports = []
    for number, part in enumerate(parts):
        # after the first update of a batch the learner's weights match no published version
        version = work.step if number == 0 else NO_VERSION
        plan = make_plan(learner, config, method, work, part, version)
        with naming(method):
            reports.append(learner.step(plan))
    return combined(reports)


def updates_and_epochs(config: Config, demand: Demand) -> tuple[int, int]:
    """Into how many parts a batch is split, and how often. The method decides, else the config; a
    step without rollouts is then one update.
    """
    if demand.updates is not None:
        return demand.updates, 1
    if not demand.prompts:
        return 1, 1
    return config.learner.updates_per_batch, config.learner.epochs_per_batch


def make_plan(
    learner: Learner,
    config: Config,
    method: Method,
    work: Work,
    rows: Sequence[Row],
    version: int,
) -> StepPlan:
    """The optimizer step on `rows`. Tokens of weight version `version` are as new as the weights
    that they train.
    """
    with naming(method):
        z = denominators(work.terms, rows)
    micro_batches = pack(
        rows,
        work.terms,
        learner.ranks,
        config.learner.micro_batch_tokens,
        version=version,
        share_prompts=learner.shares_prompts and method.forward is None,
    )
    needs_entropy = any("entropy" in term.needs for term in work.terms)
    # not of a term without a token here: no row may have what they read
    trained = [term for term in work.terms if any(has_tokens(row, term.name) for row in rows)]
    return StepPlan(
        terms=tuple(work.terms),
        denominators=z,
        temperature=work.temperature,
        optimizer=work.demand.optimizer,
        micro_batches=micro_batches,
        learning_rate=work.learning_rate,
        forward=method.forward,
        step=work.step,
        entropy=config.learner.entropy or needs_entropy,
        quantities=quantities_of(trained),
    )


def split(rows: Sequence[Row], parts: int, rng: np.random.Generator) -> list[list[Row]]:
    """`parts` lists of whole groups, sampled and expert rows spread evenly over all of them."""
    groups: dict[int, list[Row]] = {}
    single: list[list[Row]] = []
    for row in rows:
        if row.group >= 0:
            groups.setdefault(row.group, []).append(row)
        else:
            single.append([row])
    out: list[list[Row]] = [[] for _ in range(parts)]
    for units in (list(groups.values()), single):
        for place, i in enumerate(rng.permutation(len(units))):
            out[place % parts].extend(units[i])
    return [part for part in out if part]


def combined(reports: Sequence[StepReport]) -> StepReport:
    """Tokens and seconds are sums over the optimizer steps, all else is their mean."""
    found: dict[str, list[float]] = {}
    for report in reports:
        for key, value in report.metrics.items():
            found.setdefault(key, []).append(value)
    return StepReport(
        {key: float(over_steps(key)(values)) for key, values in found.items()},
        any(report.skipped for report in reports),
        sum(report.seconds for report in reports),
    )


def over_steps(key: str):
    """How a metric of several optimizer steps becomes one."""
    if key.startswith(("tokens/", "seconds/")):
        return np.sum
    return np.max if key == "gap/max" else np.mean
