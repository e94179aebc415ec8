"""The training loop.

Everything else is a component it calls; synchronous, one-step-off and asynchronous runs differ by a
number.

    step k:  request rollouts up to step k + staleness -> wait for those of step k -> rows and terms of the method ->
             optimizer step(s) -> new weights to the engines, verified -> report, evaluate, checkpoint

Weight version v means: the weights after v steps. SFT steps without a rollout ahead leave the
engines alone; they get their weights when next used. With rollout.sleep engines sleep from the
moment a step has its rollouts until the next new weights, which come before any generation (see
Run.sync).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from tandem.algorithms.base import Batch, Demand, Term
from tandem.algorithms.checks.method import check_metrics, check_terms, checked_state, naming
from tandem.algorithms.checks.rows import ask_credit, ask_rows, check_rows, has_tokens
from tandem.algorithms.parts.critic import diagnostics
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import NotFinite, SyncError
from tandem.engine.core.stop import abandonable
from tandem.engine.core.types import Row, ScoredGroup, Source, StepPlan, StepReport
from tandem.engine.learner.packing import pack
from tandem.engine.learner.terms import denominators
from tandem.engine.loop.producer import oldest_version

# {stream of a Row: its name in LearnerRank.streams}
LEARNER_STREAMS = {"old_logp": "logp", "old_value": "value"}
# a version no token has: after the first update of a batch the learner's weights are nobody's
STALE = -2


def train(run) -> None:
    """Run the steps that are left.

    `run` is engine.components.Run: the config and the components, already started.

    Returns early if a signal asked to stop. Raises Stopped if that came while it waited for
    rollouts or evaluated; run.step is then the steps done.
    """
    cfg, method, signals, skipped = run.config, run.method, run.signals, 0
    checked_state(method)
    used: dict[str, bool] = {}  # {term: whether a row has had a token of it}
    if run.evaluation_missing():
        run.evaluate(run.step)
    while not run.done:
        step, clock = run.step, Clock()
        if run.producer.wants_weights(step, signals):
            run.sync(step)
        clock.lap("sync")
        run.producer.ensure(step, signals)
        sampled = run.producer.books.tokens
        with abandonable():
            demand, groups = run.producer.take(step)
        experts = (
            tuple(run.experts.take(demand.experts)) if demand.experts and not method.aligned else ()
        )
        if cfg.rollout.sleep:
            run.sleep()
        clock.lap("rollout")

        batch = Batch(step, groups, experts, signals, off_policy=run.off_policy)
        if demand.set_reference:
            run.learner.set_reference()
        temperature = step_temperature(cfg, demand)
        rows, terms = ask_rows(method, batch), method.terms(batch)
        terms = check_terms(method, terms)
        rows = with_streams(run, check_rows(method, rows, terms), terms, temperature)
        rows = ask_credit(method, rows, batch, terms)
        used |= {
            term.name: used.get(term.name, False) or any(has_tokens(row, term.name) for row in rows)
            for term in terms
        }
        check_staleness(step, groups, cfg.rollout.staleness, cfg.rollout.backend)
        if groups and run.gated < cfg.sync.gate_steps and not run.off_policy:
            run.gate(rows, step, temperature)
        clock.lap("prepare")

        report = update(run, step, demand, rows, terms, temperature)
        clock.lap("learn")
        skipped = skipped + 1 if report.skipped else 0
        if report.skipped:
            run.dump_step(step, rows, report)
        if skipped > cfg.learner.max_skipped_steps:
            raise NotFinite(
                f"{skipped} steps in a row had a non-finite gradient "
                f"(learner.max_skipped_steps is {cfg.learner.max_skipped_steps}); "
                f"the rows of each are in {run.folder / 'bad_steps'}; weights are those "
                "before the first of them"
            )
        run.step = step + 1
        run.optimizer_steps[demand.optimizer] = run.optimizer_steps.get(demand.optimizer, 0) + 1
        run.tokens += (
            int(report.metrics.get("tokens/real", 0)) + run.producer.books.tokens - sampled
        )

        metrics = {**report.metrics, **rollout_metrics(groups), **diagnostics(rows)}
        method.observe(step, metrics)
        metrics |= check_metrics(method, method.metrics(step))
        signals = run.signals = carried(signals, metrics)
        if run.producer.wants_weights(step + 1, signals) or run.evaluation_due(step + 1):
            run.sync(step + 1)
        clock.lap("sync")
        run.report(step, demand, groups, metrics, clock)
        if run.evaluation_due(step + 1):
            run.evaluate(step + 1)
        if run.checkpoint_due(step + 1):
            run.checkpoint()
        if run.stop_requested:
            return
    if idle := [name for name, had_tokens in used.items() if not had_tokens]:
        run.display.message(
            f"no row ever had a token of the method's term(s) {', '.join(idle)}: they "
            "trained nothing"
        )


def step_temperature(config: Config, demand: Demand) -> float:
    """The one temperature of a step, for scoring before the update, for the update and for the
    gate.

    Rollouts are trained on at the temperature they were sampled at. A step without any is plain
    SFT, at 1.
    """
    return config.rollout.temperature if demand.prompts else 1.0


def update(
    run, step: int, demand: Demand, rows: Sequence[Row], terms: Sequence[Term], temperature: float
) -> StepReport:
    """One optimizer step per part of the batch, in each epoch; with several, the clip needs the
    log-probs from before the first. A step without rollouts has one.

    Tokens and seconds of the report are sums over these steps, everything else is their mean.
    """
    learner = run.config.learner
    if not any(row.trained.any() for row in rows):
        return StepReport({"empty": 1.0})
    parts = [rows]
    if demand.prompts and learner.updates_per_batch * learner.epochs_per_batch > 1:
        unscored = [i for i, row in enumerate(rows) if row.old_logp is None and row.trained.any()]
        if unscored:
            rows = filled(
                rows,
                unscored,
                {"old_logp": run.learner.logprobs([rows[i] for i in unscored], temperature)},
            )
        rng = np.random.default_rng([run.config.run.seed, step])
        parts = [
            part
            for _ in range(learner.epochs_per_batch)
            for part in split(rows, learner.updates_per_batch, rng)
        ]
    reports = []
    for number, part in enumerate(parts):
        with naming(run.method):
            z = denominators(terms, part)
        plan = StepPlan(
            step=step,
            terms=tuple(terms),
            denominators=z,
            temperature=temperature,
            optimizer=demand.optimizer,
            micro_batches=pack(
                part,
                terms,
                run.learner.ranks,
                learner.micro_batch_tokens,
                version=step if number == 0 else STALE,
                share=run.learner.shares_prompts and run.method.forward is None,
            ),
            learning_rate=run.learning_rate(step, demand),
            forward=run.method.forward,
            entropy=learner.entropy or any("entropy" in t.needs for t in terms),
        )
        with naming(run.method):
            reports.append(run.learner.step(plan))
    keys = {key: None for report in reports for key in report.metrics}

    def over(key):
        return (
            np.sum
            if key.startswith(("tokens/", "seconds/"))
            else np.max
            if key == "gap/max"
            else np.mean
        )

    return StepReport(
        {
            key: float(over(key)([r.metrics[key] for r in reports if key in r.metrics]))
            for key in keys
        },
        any(r.skipped for r in reports),
        sum(r.seconds for r in reports),
    )


def with_streams(run, rows: Sequence[Row], terms: Sequence[Term], temperature: float) -> list[Row]:
    """Add what terms need from before the update: the learner's own log-probs and values, and the
    reference's log-probs.

    Only rows with a token of a term that needs a stream are scored; the stream stays absent (None)
    in all others.
    """
    wanted = [name for name in LEARNER_STREAMS if any(name in term.needs for term in terms)]
    chosen = needing(rows, terms, wanted)
    if chosen:
        found = run.learner.streams([rows[i] for i in chosen], temperature)
        rows = filled(rows, chosen, {name: found[LEARNER_STREAMS[name]] for name in wanted})
    chosen = needing(rows, terms, ["ref_logp"])
    if chosen:
        found = run.learner.logprobs([rows[i] for i in chosen], temperature, reference=True)
        rows = filled(rows, chosen, {"ref_logp": found})
    return rows


def needing(rows: Sequence[Row], terms: Sequence[Term], streams: Sequence[str]) -> list[int]:
    """Places of the rows that have a token of a term that needs one of `streams`."""
    names = [term.name for term in terms if any(stream in term.needs for stream in streams)]
    return [i for i, row in enumerate(rows) if any(has_tokens(row, name) for name in names)]


def filled(
    rows: Sequence[Row], places: Sequence[int], streams: Mapping[str, Sequence[np.ndarray]]
) -> list[Row]:
    """All rows; those at `places` with `streams`, {name: one float32 [T] per place}."""
    rows = list(rows)
    for number, i in enumerate(places):
        rows[i] = replace(rows[i], **{name: found[number] for name, found in streams.items()})
    return rows


def split(rows: Sequence[Row], parts: int, rng: np.random.Generator) -> list[list[Row]]:
    """`parts` lists of whole groups, sampled and expert rows spread evenly over all of them."""
    keys: dict[tuple, list[Row]] = {}
    for i, row in enumerate(rows):
        keys.setdefault(("group", row.group) if row.group >= 0 else ("row", i), []).append(row)
    out: list[list[Row]] = [[] for _ in range(parts)]
    for kind in ("group", "row"):
        units = [unit for key, unit in keys.items() if key[0] == kind]
        for place, i in enumerate(rng.permutation(len(units))):
            out[place % parts].extend(units[i])
    return [part for part in out if part]


def check_staleness(step: int, groups: Sequence[ScoredGroup], bound: int, backend: str) -> None:
    """Assert what the producer promises: no token was sampled with weights more than `bound` steps
    old.
    """
    oldest = oldest_version(groups)
    if oldest is not None and backend != "replay" and step - oldest > bound:
        raise SyncError(
            f"step {step} was about to train on tokens sampled with weight version {oldest}; "
            f"rollout.staleness allows {bound} steps. "
            "The engines did not take the newer weights"
        )


def carried(signals: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """What is known after a step: its metrics, and of those it did not measure the last that were.

    An SFT step has no reward, a skipped one no finite gradient; what goes by one of them
    (schedules) would start over there otherwise.
    """
    return {**signals, **{key: value for key, value in metrics.items() if np.isfinite(value)}}


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What every RL run must show about its rollouts."""
    if not groups:
        return {}
    rewards = np.concatenate([g.rewards for g in groups])
    lengths = np.array(
        [int((t.source == Source.POLICY).sum()) for g in groups for t in g.trajectories]
    )
    spread = np.array([g.rewards.std() for g in groups])
    parts = {name for g in groups for o in g.outcomes for name in o.parts}
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/no_signal_groups": float((spread == 0).mean()),
        **{
            f"reward/{name}": float(
                np.mean([o.parts[name] for g in groups for o in g.outcomes if name in o.parts])
            )
            for name in sorted(parts)
        },
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/tokens": float(lengths.sum()),
        "rollout/truncated": float(
            np.mean([t.finish == "length" for g in groups for t in g.trajectories])
        ),
        "rollout/samples": float(len(lengths)),
    }


class Clock:
    """Seconds per phase of a step: `lap(phase)` books the time since the lap before."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def metrics(self) -> Mapping[str, float]:
        return {
            **{f"time/{k}": v for k, v in self.seconds.items()},
            "time/step": self.last - self.start,
        }
