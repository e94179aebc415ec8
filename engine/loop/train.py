"""The training loop.

Everything else is a component it calls; synchronous, one-step-off and asynchronous runs differ by a
number.

    step k:  request rollouts up to step k + staleness -> wait for those of step k -> rows and terms
             of the method -> optimizer step(s) -> new weights to the engines, verified -> report,
             evaluate, checkpoint

Weight version v means: the weights after v steps. SFT steps without a rollout ahead leave the
engines alone; they get their weights when next used. With rollout.sleep engines sleep from the
moment a step has its rollouts until the next new weights, which come before any generation (see
Sync.publish).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.checks.method import check_metrics, check_state
from tandem.algorithms.checks.rows import ask_credit, ask_rows, ask_score, check_rows, has_tokens
from tandem.algorithms.checks.terms import ask_probes, check_terms
from tandem.engine.config.names import source_key
from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import NotFinite, SyncError
from tandem.engine.core.types import Row, ScoredGroup
from tandem.engine.data.sources import ExpertSource
from tandem.engine.learner.learning_rate import learning_rate
from tandem.engine.learner.protocol import Learner
from tandem.engine.loop.demonstrations import draw_demonstrations, never_asked
from tandem.engine.loop.evaluation import Evaluator
from tandem.engine.loop.producer import Producer, oldest_version
from tandem.engine.loop.reporter import Clock, Reporter, latest_signals, rollout_metrics
from tandem.engine.loop.saver import Saver
from tandem.engine.loop.state import RunState
from tandem.engine.loop.streams import with_streams
from tandem.engine.loop.sync import Sync
from tandem.engine.loop.update import Work, step_temperature, update
from tandem.engine.report.display import Display


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """What the loop calls, all of it started (see launch/run/start.py)."""

    config: Config
    folder: Path  # of the run
    method: Method
    learner: Learner
    producer: Producer
    experts: Mapping[str, ExpertSource]  # by name
    sync: Sync
    evaluator: Evaluator
    reporter: Reporter
    saver: Saver
    display: Display


def train(components: Components, state: RunState) -> None:
    """Run the steps that are left.

    Returns early if a signal asked to stop. Raises Stopped if that came while it waited for
    rollouts or evaluated; state.step is then the steps done.
    """
    config = components.config
    method = components.method
    learner = components.learner
    producer = components.producer
    sync = components.sync
    evaluator = components.evaluator
    reporter = components.reporter
    skipped = 0  # steps in a row
    term_had_tokens: dict[str, bool] = {}
    check_state(method)
    if evaluator.missing(state):
        evaluate(evaluator, state)

    while not state.done(config.run):
        step, clock = state.step, Clock()

        # weights, where the rollouts to come need newer ones
        if producer.wants_weights(step, state.signals):
            sync.publish(step)
        clock.lap("sync")

        # rollouts and demonstrations
        producer.request_ahead(step, state.signals)
        with stop.abandonable():
            rollouts = producer.collect(step)
        demand, groups = rollouts.demand, rollouts.groups
        if demand.ends_before:
            end_before(components, state, demand.stop)
            break
        experts = draw_demonstrations(method, demand, components.experts)
        if config.rollout.sleep:
            sync.sleep()
        clock.lap("rollout")

        # rows and terms of the method
        if demand.set_reference:
            learner.set_reference()
        batch = Batch(
            step,
            groups,
            experts,
            state.signals,
            off_policy=sync.off_policy,
            budget=producer.budget,
        )
        batch = ask_score(method, batch)
        groups = batch.groups
        temperature = step_temperature(config, demand)
        rows = ask_rows(method, batch)
        terms = check_terms(method, method.terms(batch), batch.budget.models)
        rows = check_rows(method, rows, terms)
        probes = ask_probes(method, batch, rows)
        rows = with_streams(learner, rows, terms, temperature, probes)
        rows = ask_credit(method, rows, batch, terms)
        note_tokens(term_had_tokens, terms, rows)
        check_staleness(step, groups, config)
        if groups and sync.gates_left and not sync.off_policy:
            sync.gate(rows, step, temperature)
        clock.lap("prepare")

        # optimizer steps
        taken = state.optimizer_steps.get(demand.optimizer, 0)
        rate = learning_rate(config, demand, step, taken)
        work = Work(step, demand, rows, terms, temperature, rate)
        report = update(learner, config, method, work)
        clock.lap("learn")
        skipped = skipped + 1 if report.skipped else 0
        if report.skipped:
            reporter.skipped(step, rows, report)
        if skipped > config.learner.max_skipped_steps:
            raise too_many_skipped(skipped, components)
        state.step += 1
        state.stopped = demand.stop
        state.optimizer_steps[demand.optimizer] = taken + 1
        state.tokens += int(report.metrics.get("tokens/real", 0)) + rollouts.tokens

        # what the next step knows
        metrics = {**report.metrics, **rollout_metrics(groups), **method.diagnostics(rows)}
        method.observe(step, {**evaluations(state.signals), **metrics})
        of_method = check_metrics(method, method.metrics(step))
        metrics.update(of_method)
        state.signals = latest_signals(state.signals, metrics)

        # new weights to the engines, numbers to the user
        next_step = state.step
        if producer.wants_weights(next_step, state.signals) or evaluator.due(state):
            sync.publish(next_step)
        clock.lap("sync")
        reporter.step(step, groups, {**metrics, **state.metrics()}, of_method, clock)
        sync.check_update(metrics, step)

        # evaluation, checkpoint, a signal to stop
        if evaluator.due(state):
            evaluate(evaluator, state)
        if components.saver.due(state):
            components.saver.save(state)
        if stop.requested():
            return

    idle = [name for name, had_tokens in term_had_tokens.items() if not had_tokens]
    if idle:
        components.display.message(
            f"no row ever had a token of the method's term(s) {', '.join(idle)}: they "
            "trained nothing"
        )
    for name in never_asked(method, components.experts):
        components.display.message(
            f"{source_key(name)} was read, but no step asked for any of it; leave it out, or make "
            "the method ask for it (Demand.experts)"
        )


def note_tokens(
    term_had_tokens: dict[str, bool], terms: Sequence[Term], rows: Sequence[Row]
) -> None:
    """Bring {term: whether any row of the run has had a token of it} up to date."""
    for term in terms:
        if term.coefficient == 0:
            continue  # it is not there to train
        has_any = any(has_tokens(row, term.name) for row in rows)
        term_had_tokens[term.name] = term_had_tokens.get(term.name, False) or has_any


def evaluate(evaluator: Evaluator, state: RunState) -> None:
    """Evaluate the present weights; the method may go by what was found."""
    evaluator.evaluate(state.step)
    state.signals = latest_signals(state.signals, evaluator.signals())


def evaluations(signals: Mapping[str, float]) -> dict[str, float]:
    """The numbers of the latest evaluation."""
    return {name: value for name, value in signals.items() if name.startswith("eval/")}


def end_before(components: Components, state: RunState, reason: str) -> None:
    """The method ends the run instead of the next step: evaluate and save what there is."""
    state.stopped = reason
    if components.evaluator.missing(state):
        components.sync.publish(state.step)
        evaluate(components.evaluator, state)
    components.saver.save(state)


def check_staleness(step: int, groups: Sequence[ScoredGroup], config: Config) -> None:
    """Assert what the producer promises: no token was sampled with weights more than
    rollout.staleness steps old.
    """
    bound = config.rollout.staleness
    oldest = oldest_version(groups)
    if oldest is None or config.rollout.backend == "replay":
        return
    if step - oldest > bound:
        raise SyncError(
            f"step {step} was about to train on tokens sampled with weight version {oldest}; "
            f"rollout.staleness allows {bound} steps. "
            "The engines did not take the newer weights"
        )


def too_many_skipped(skipped: int, components: Components) -> NotFinite:
    return NotFinite(
        f"{skipped} steps in a row had a non-finite gradient "
        f"(learner.max_skipped_steps is {components.config.learner.max_skipped_steps}); "
        f"the rows of each are in {components.folder / 'bad_steps'}; weights are those "
        "before the first of them"
    )
