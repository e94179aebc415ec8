"""Held-out evaluation: the same engines, prompts and reward functions as training, on problems that
nothing is trained on.

`eval/accuracy` is the mean of the first reward function (the verifier) over all scored samples;
samples whose reward failed are left out and counted in `eval/errors`, so that a broken verifier
shows as errors and not as wrong answers.

`eval/standard_error` counts problems, not samples. Samples of one problem are not independent:
sixteen of a problem that is always right say no more than one. It is the clustered standard error,

    sqrt( sum_problems ( sum_samples (x - accuracy) )^2 ) / samples

with every scored sample in the cluster of its problem. Rows with the same prompt are one problem:
benchmarks are often stored with each problem many times. With one sample of each problem it is the
usual std/sqrt(problems); with equally many it is that of the means of the problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied
from tandem.engine.core.outcomes import EvalResult
from tandem.engine.core.types import Finish, GenRequest, Prompt, RewardOutcome, Sampling, Trajectory
from tandem.engine.learner.protocol import Pool
from tandem.engine.loop import group_numbers
from tandem.engine.loop.state import RunState
from tandem.engine.report.display import Display
from tandem.engine.report.telemetry import Telemetry
from tandem.rollout.rewards.runner import RewardRunner

Decode = Callable[[np.ndarray, Finish], str]


@dataclass(eq=False, kw_only=True)
class Evaluator:
    """When to evaluate, and where the numbers go. `restart_and_sync()` replaces dead engines."""

    config: Config
    pool: Pool
    rewards: RewardRunner | None
    prompts: Sequence[Prompt]  # none: nothing is evaluated
    verifier: str | None  # name of the first reward function
    decode: Decode
    restart_and_sync: Callable[[], None]
    telemetry: Telemetry
    display: Display

    first: EvalResult | None = field(default=None, init=False)
    last: EvalResult | None = field(default=None, init=False)
    evaluated_at: int = field(default=-1, init=False)

    def due(self, state: RunState) -> bool:
        """Whether the weights after `state.step` steps are to be evaluated."""
        if not self.prompts:
            return False
        every = self.config.eval.every
        return state.done(self.config.run) or bool(every and state.step % every == 0)

    def missing(self, state: RunState) -> bool:
        """Whether the evaluation before the first step, or that of the checkpoint a resumed run
        begins with, was left or never made.
        """
        due = self.due(state) if state.step else self.config.eval.before
        return due and state.step not in self.telemetry.evaluations

    def evaluate(self, step: int) -> None:
        """Evaluate the weights after `step` steps, once."""
        if not self.prompts or self.evaluated_at == step:
            return
        assert self.rewards is not None and self.verifier is not None, "no reward.functions"
        config = self.config
        sampling = Sampling(
            config.eval.max_tokens or config.rollout.max_tokens,
            config.eval.temperature,
            seed=config.run.seed,
        )
        with stop.abandonable():
            result = evaluate(
                self.pool,
                self.rewards,
                self.prompts,
                sampling,
                config.eval.samples,
                self.verifier,
                self.decode,
                self.restart_and_sync,
            )
        self.first = self.first or result
        self.last, self.evaluated_at = result, step
        self.telemetry.evaluation(step, vars(result))
        self.display.evaluation(step, result.accuracy)
        self.display.message(
            f"held-out accuracy after {step} steps: {result.accuracy:.3f} +- "
            f"{result.standard_error:.3f} ({result.describe()})"
        )

    def signals(self) -> dict[str, float]:
        """The numbers of the latest evaluation, by their names in metrics.jsonl."""
        if self.last is None:
            return {}
        return {f"eval/{name}": float(value) for name, value in vars(self.last).items()}

    def restore_history(self) -> None:
        """Take the evaluations from before a resume out of the telemetry."""
        for step, numbers in sorted(self.telemetry.evaluations.items()):
            self.last = recorded_result(numbers)
            self.first = self.first or self.last
            self.display.evaluation(step, numbers["accuracy"])


def recorded_result(numbers: Mapping[str, float | None]) -> EvalResult:
    """From a line of metrics.jsonl, where NaN is null."""
    known = {}
    for key, value in numbers.items():
        known[key] = math.nan if value is None else value
    return EvalResult(**known)


def evaluate(
    pool: Pool,
    rewards: RewardRunner,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    verifier: str,
    decode: Decode,
    restart_and_sync: Callable[[], None],
) -> EvalResult:
    """Sample every prompt `samples` times and score. An engine that dies is restarted and the
    evaluation asked again."""
    generated = generate(pool, prompts, sampling, samples, restart_and_sync)
    scorings = []
    for prompt, trajectories in zip(prompts, generated, strict=True):
        texts = [decode(t.response, t.finish) for t in trajectories]
        scorings.append(rewards.submit(prompt, texts, [t.response for t in trajectories]))
    asked = 0
    scored: list[list[RewardOutcome]] = []  # [problem][sample]
    for scoring in scorings:
        outcomes = stop.result(scoring)
        asked += len(outcomes)
        scored.append([o for o in outcomes if o.error is None and verifier in o.parts])
    values = by_problem(prompts, [[o.parts[verifier] for o in one] for one in scored])
    count = sum(map(len, scored))
    return EvalResult(
        accuracy=mean([x for one in values for x in one]),
        reward=mean([o.value for one in scored for o in one if o.value is not None]),
        length=mean([len(t.response) for trajectories in generated for t in trajectories]),
        samples=count,
        errors=asked - count,
        standard_error=standard_error(values),
        problems=sum(1 for one in values if one),
    )


def generate(
    pool: Pool,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    restart_and_sync: Callable[[], None],
) -> list[tuple[Trajectory, ...]]:
    """The samples of every prompt; all are asked for again if an engine dies."""
    requests = []
    for i, prompt in enumerate(prompts):
        requests.append(GenRequest(group_numbers.EVALUATION + i, prompt, samples, sampling))
    while True:
        futures = [pool.submit(request) for request in requests]
        try:
            return [stop.result(future) for future in futures]
        except EngineDied:
            restart_and_sync()


def by_problem(prompts: Sequence[Prompt], values: Sequence[Sequence[float]]) -> list[list[float]]:
    """The values of each row's samples, put together for rows that have the same prompt."""
    found: dict[bytes, list[float]] = {}
    for prompt, mine in zip(prompts, values, strict=True):
        found.setdefault(prompt.tokens.tobytes(), []).extend(mine)
    return list(found.values())


def mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers)) if len(numbers) else float("nan")


def standard_error(values: Sequence[Sequence[float]]) -> float:
    """Clustered standard error of the mean of all values, [problem][sample]. NaN with fewer than
    two problems that have a value: then nothing is known of how problems differ."""
    clusters = [np.array(one, np.float64) for one in values if len(one)]
    if len(clusters) < 2:
        return float("nan")
    center = np.concatenate(clusters).mean()
    residuals = np.array([(one - center).sum() for one in clusters])
    samples = sum(map(len, clusters))
    return float(np.sqrt((residuals**2).sum()) / samples)
