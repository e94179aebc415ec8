"""Held-out evaluation: the same engines, prompts and reward functions as training, on problems that nothing is trained on.

`eval/accuracy` is the mean of the first reward function (the verifier) over all scored samples; samples whose reward failed are left out and
counted in `eval/errors`, so that a broken verifier shows as errors and not as wrong answers.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.engine.types import GenRequest, Prompt, Sampling
from tandem.rollout.backend import EngineDied

EVAL_GROUPS = 1 << 40   # group ordinals of evaluation requests start here: they never meet those of training


@dataclass(frozen=True)
class EvalResult:
    accuracy: float         # mean of the verifier, in its own unit
    reward: float           # mean of the weighted sum
    length: float           # mean response tokens
    samples: int
    errors: int
    standard_error: float   # of the accuracy

    def metrics(self) -> dict[str, float]:
        return {"eval/accuracy": self.accuracy, "eval/reward": self.reward, "eval/length": self.length, "eval/samples": self.samples,
                "eval/errors": self.errors, "eval/standard_error": self.standard_error}


def evaluate(pool, rewards, prompts: Sequence[Prompt], sampling: Sampling, samples: int, verifier: str, decode: Callable[[np.ndarray], str],
             recover: Callable[[], None]) -> EvalResult:
    """Sample every prompt `samples` times and score. An engine that dies is restarted and the evaluation asked again."""
    requests = [GenRequest(group=EVAL_GROUPS + i, prompt=p, samples=samples, sampling=sampling) for i, p in enumerate(prompts)]
    while True:
        generations = [pool.submit(r) for r in requests]
        try:
            done = [g.result() for g in generations]
            break
        except EngineDied:
            recover()
    scorings = [rewards.submit(p, [decode(t.response) for t in ts], [t.response for t in ts]) for p, ts in zip(prompts, done)]
    outcomes = [o for s in scorings for o in s.result()]
    scored = [o for o in outcomes if o.error is None and verifier in o.parts]
    values = np.array([o.parts[verifier] for o in scored], np.float64)
    mean = lambda xs: float(np.mean(xs)) if len(xs) else float("nan")
    return EvalResult(accuracy=mean(values), reward=mean([o.value for o in scored]), length=mean([len(t.response) for ts in done for t in ts]),
                      samples=len(scored), errors=len(outcomes) - len(scored),
                      standard_error=float(values.std() / np.sqrt(len(values))) if len(values) else float("nan"))
