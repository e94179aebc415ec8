"""The numbers of a step: to files, trackers and the screen."""

from __future__ import annotations

import pickle
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tandem.engine.core.types import Finish, Row, ScoredGroup, Source, StepReport
from tandem.engine.learner.protocol import Pool
from tandem.engine.loop.producer import Producer
from tandem.engine.loop.waves import first_rewards
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry


class Clock:
    """Seconds per phase of a step: `lap(phase)` books the time since the lap before."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        so_far = self.seconds.get(phase, 0.0)
        self.seconds[phase] = so_far + now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        found = {}
        for phase, seconds in self.seconds.items():
            found[f"time/{phase}"] = seconds
        found["time/step"] = self.total
        return found

    @property
    def total(self) -> float:
        """Seconds from the start to the last lap."""
        return self.last - self.start


@dataclass(eq=False, kw_only=True)
class Reporter:
    pool: Pool
    producer: Producer
    telemetry: Telemetry
    display: Display
    folder: Path  # of the run

    pool_stats: Mapping[str, float] = field(default_factory=dict, init=False)  # a step ago
    told_display: bool = field(default=False, init=False)  # that the terminal is gone

    def step(
        self,
        step: int,
        groups: Sequence[ScoredGroup],
        metrics: Mapping[str, float],
        of_method: Mapping[str, float],
        clock: Clock,
    ) -> None:
        """Step `step` (0-based) is done.

        `metrics` are those of its update, its rollouts, its method and its run; those of the
        producer, the clock and the pool are added. The display shows `of_method` apart.
        """
        found = dict(metrics)
        found.update(self.producer.metrics())
        found.update(clock.metrics())
        found.update(self.speed(clock, metrics))
        found["cpu_seconds"] = time.process_time()
        self.telemetry.step(step, found)
        self.telemetry.rollouts(step, groups, step)
        lost = self.display.lost
        if lost is not None and not self.told_display:
            self.told_display = True
            self.telemetry.event("display_lost", reason=str(lost))
        self.display.step(step, found, of_method)

    def speed(self, clock: Clock, metrics: Mapping[str, float]) -> dict[str, float]:
        """Tokens per second of either side while it worked, and the share of the step's wall time
        in which it did not.
        """
        before = self.pool_stats
        now = self.pool.stats()
        self.pool_stats = now
        busy = now["busy_seconds"] - before.get("busy_seconds", 0.0)
        generated = now["generated_tokens"] - before.get("generated_tokens", 0.0)
        engines = now.get("engines", 1.0)
        whole = max(clock.total, 1e-9)
        learn = clock.seconds.get("learn", 0.0)
        learner_share = learn / whole
        found = {"learner/idle": max(0.0, 1.0 - learner_share)}
        if engines:
            rollout_share = busy / engines / whole
            found["rollout/idle"] = max(0.0, 1.0 - rollout_share)
        if busy > 0:
            found["rollout/tokens_per_second"] = generated * engines / busy
        if learn > 0 and "tokens/real" in metrics:
            found["learner/tokens_per_second"] = metrics["tokens/real"] / learn
        return found

    def skipped(self, step: int, rows: Sequence[Row], report: StepReport) -> None:
        """The gradient of a step was not finite: keep its rows."""
        folder = self.folder / "bad_steps"
        folder.mkdir(exist_ok=True)
        metrics = dict(report.metrics)
        kept = {"step": step, "rows": list(rows), "metrics": metrics}
        file = folder / f"step_{step}.pkl"
        file.write_bytes(pickle.dumps(kept))
        self.telemetry.event("skipped_step", step=step, metrics=metrics)
        self.display.message(
            f"step {step}: gradient not finite, weights left alone, rows saved to {folder}"
        )


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What every RL run must show about its rollouts."""
    if not groups:
        return {}
    rewards = np.concatenate([group.rewards for group in groups])
    spreads = [group.rewards.std() for group in groups]
    parts = reward_parts(groups)
    found = {}
    if parts or rewards.any():  # else nobody scores
        found["reward/mean"] = rewards.mean()
        found["reward/std"] = rewards.std()
        found["reward/no_signal_groups"] = spreads.count(0) / len(groups)
    for name in sorted(parts):
        found[f"reward/{name}"] = np.mean(parts[name])
    sampled = []  # tokens of each rollout
    truncated = []
    for group in groups:
        for trajectory in group.trajectories:
            is_sampled = trajectory.source == Source.POLICY
            sampled.append(int(is_sampled.sum()))
            truncated.append(trajectory.finish == Finish.LENGTH)
    lengths = np.array(sampled)
    found["rollout/length"] = lengths.mean()
    found["rollout/length_max"] = lengths.max()
    found["rollout/tokens"] = lengths.sum()
    found["rollout/truncated"] = np.mean(truncated)
    found["rollout/samples"] = len(lengths)
    found.update(wave_metrics(groups))
    return {name: float(value) for name, value in found.items()}


def wave_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Where a method asked again: in what share of the groups, how often at most, and what the
    first wave was worth. Nothing where none was asked for.
    """
    waves = [group.waves for group in groups]
    if not any(waves):
        return {}
    first = np.concatenate([first_rewards(group) for group in groups])
    return {
        "wave/asked_again": np.count_nonzero(waves) / len(groups),
        "wave/most": max(waves),
        "wave/first_reward": float(first.mean()),
    }


def reward_parts(groups: Sequence[ScoredGroup]) -> dict[str, list[float]]:
    """The values of each reward function."""
    parts: dict[str, list[float]] = {}
    for group in groups:
        for outcome in group.outcomes:
            for name, value in outcome.parts.items():
                parts.setdefault(name, []).append(value)
    return parts


def latest_signals(signals: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """What is known after a step: its metrics, and of those it did not measure the last that were.

    An SFT step has no reward, a skipped one no finite gradient; what goes by one of them
    (schedules) would start over there otherwise.
    """
    latest = dict(signals)
    for key, value in metrics.items():
        if np.isfinite(value):
            latest[key] = value
    return latest
