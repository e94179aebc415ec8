"""What can be asked of a model without training it: held-out accuracy, and whether engines and
learner compute the same.
"""

from __future__ import annotations

import time
from dataclasses import replace

from tandem.algorithms.base import Budget
from tandem.algorithms.registry import configured
from tandem.algorithms.rows import policy_row
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Sampling
from tandem.launch.run.folder import new_folder
from tandem.launch.run.run import started


def evaluate_model(config: Config) -> int:
    """Held-out accuracy of model.path as it is: engines only, no learner."""
    if config.data.evaluation is None or not config.reward.functions:
        raise ConfigError(
            "an evaluation needs data.evaluation and reward.functions; one of them is not set"
        )
    with started(in_own_folder(config, rollout_only=True)) as run:
        run.evaluate(0)
    return 0


def in_own_folder(config: Config, **changes) -> Config:
    """The config with a run folder of its own, so that evaluations and checks neither meet a run
    nor overwrite each other.
    """
    name = new_folder(config.run.dir, f"{config.run.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    return replace(config, run=replace(config.run, name=name, resume=False, **changes))


def check_logprobs(config: Config) -> int:
    """Sample one batch and compare the engines' log-probs with the learner's, before and after a
    weight sync. Exit code 1 if a gap is over its bound.
    """
    if (
        config.rollout.backend == "replay"
        or config.data.prompts is None
        or not configured(config.method).uses_rollouts
    ):
        raise ConfigError(
            "check-logprobs samples prompts with an engine: it needs data.prompts, a method "
            "that uses rollouts, and a rollout.backend other than replay"
        )
    with started(in_own_folder(config)) as run:
        for label, version in (("weights as loaded", 0), ("after a sync", 1)):
            run.sync(version)
            requests = [
                run.method.request(
                    i + (version << 20),
                    p,
                    Sampling(
                        config.rollout.max_tokens,
                        config.rollout.temperature,
                        config.rollout.top_p,
                        seed=i,
                    ),
                    0,
                    Budget(1, config.rollout.samples_per_prompt, 0, 1),
                )
                for i, p in enumerate(run.prompts.take(config.rollout.prompts_per_step))
            ]
            rows = [
                policy_row(t, 0.0, "policy")
                for future in [run.pool.submit(r) for r in requests]
                for t in future.result()
            ]
            largest, mean, tokens = run.gap(rows, version, config.rollout.temperature)
            run.display.message(
                f"{label}: {tokens} tokens   max gap {largest:.3g}   mean gap {mean:.3g}"
            )
            run.check_gap(largest, mean, version)
    return 0
