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
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry


class Clock:
    """Seconds per phase of a step: `lap(phase)` books the time since the lap before."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def metrics(self) -> dict[str, float]:
        found = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        found["time/step"] = self.last - self.start
        return found


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
        if self.display.lost is not None and not self.told_display:
            self.told_display = True
            self.telemetry.event("display_lost", reason=str(self.display.lost))
        self.display.step(step, found, of_method)

    def speed(self, clock: Clock, metrics: Mapping[str, float]) -> dict[str, float]:
        """Tokens per second of either side while it worked, and the share of the step's wall time
        in which it did not.
        """
        before, stats = self.pool_stats, self.pool.stats()
        self.pool_stats = stats
        busy = stats["busy_seconds"] - before.get("busy_seconds", 0.0)
        tokens = stats["generated_tokens"] - before.get("generated_tokens", 0.0)
        engines = stats.get("engines", 1.0)
        whole = max(clock.last - clock.start, 1e-9)
        learn = clock.seconds.get("learn", 0.0)
        found = {"learner/idle": max(0.0, 1.0 - learn / whole)}
        if engines:
            found["rollout/idle"] = max(0.0, 1.0 - busy / engines / whole)
        if busy > 0:
            found["rollout/tokens_per_second"] = tokens * engines / busy
        if learn > 0 and "tokens/real" in metrics:
            found["learner/tokens_per_second"] = metrics["tokens/real"] / learn
        return found

    def skipped(self, step: int, rows: Sequence[Row], report: StepReport) -> None:
        """The gradient of a step was not finite: keep its rows."""
        folder = self.folder / "bad_steps"
        folder.mkdir(exist_ok=True)
        kept = {"step": step, "rows": list(rows), "metrics": dict(report.metrics)}
        (folder / f"step_{step}.pkl").write_bytes(pickle.dumps(kept))
        self.telemetry.event("skipped_step", step=step, metrics=dict(report.metrics))
        self.display.message(
            f"step {step}: gradient not finite, weights left alone, rows saved to {folder}"
        )


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """What every RL run must show about its rollouts."""
    if not groups:
        return {}
    rewards = np.concatenate([group.rewards for group in groups])
    spreads = np.array([group.rewards.std() for group in groups])
    trajectories = [t for group in groups for t in group.trajectories]
    lengths = np.array([int((t.source == Source.POLICY).sum()) for t in trajectories])
    parts: dict[str, list[float]] = {}  # the values of each reward function
    for group in groups:
        for outcome in group.outcomes:
            for name, value in outcome.parts.items():
                parts.setdefault(name, []).append(value)
    of_rewards = {}
    if parts or rewards.any():  # else nobody scores
        of_rewards = {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "reward/no_signal_groups": float((spreads == 0).mean()),
        }
    return {
        **of_rewards,
        **{f"reward/{name}": float(np.mean(parts[name])) for name in sorted(parts)},
        "rollout/length": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/tokens": float(lengths.sum()),
        "rollout/truncated": float(np.mean([t.finish == Finish.LENGTH for t in trajectories])),
        "rollout/samples": float(len(lengths)),
    }


def latest_signals(signals: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """What is known after a step: its metrics, and of those it did not measure the last that were.

    An SFT step has no reward, a skipped one no finite gradient; what goes by one of them
    (schedules) would start over there otherwise.
    """
    finite = {key: value for key, value in metrics.items() if np.isfinite(value)}
    return {**signals, **finite}
