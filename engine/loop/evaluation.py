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

from collections.abc import Callable, Sequence

import numpy as np

from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied
from tandem.engine.core.types import EvalResult, Finish, GenRequest, Prompt, Sampling

# Group ordinals of evaluation requests start here: they never meet those of training.
EVAL_GROUPS = 1 << 40


def evaluate(
    pool,
    rewards,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    samples: int,
    verifier: str,
    decode: Callable[[np.ndarray, Finish], str],
    recover: Callable[[], None],
) -> EvalResult:
    """Sample every prompt `samples` times and score. An engine that dies is restarted and the
    evaluation asked again."""
    requests = [
        GenRequest(group=EVAL_GROUPS + i, prompt=p, samples=samples, sampling=sampling)
        for i, p in enumerate(prompts)
    ]
    while True:
        generations = [pool.submit(r) for r in requests]
        try:
            done = [stop.result(g) for g in generations]
            break
        except EngineDied:
            recover()
    scorings = [
        rewards.submit(p, [decode(t.response, t.finish) for t in ts], [t.response for t in ts])
        for p, ts in zip(prompts, done, strict=True)
    ]
    outcomes = [list(stop.result(scoring)) for scoring in scorings]  # [problem][sample]
    scored = [[o for o in one if o.error is None and verifier in o.parts] for one in outcomes]
    values = by_problem(prompts, [[o.parts[verifier] for o in one] for one in scored])
    count = sum(map(len, scored))
    return EvalResult(
        accuracy=mean([x for one in values for x in one]),
        reward=mean([o.value for one in scored for o in one]),
        length=mean([len(t.response) for ts in done for t in ts]),
        samples=count,
        errors=sum(map(len, outcomes)) - count,
        standard_error=standard_error(values),
        problems=sum(1 for one in values if one),
    )


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
