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
from tandem.engine.core.types import Row, Sampling
from tandem.engine.loop import group_numbers
from tandem.engine.loop.train import Components
from tandem.launch.run.folder import new_folder
from tandem.launch.run.start import generation_run, training_run


def evaluate_model(config: Config) -> int:
    """Held-out accuracy of model.path as it is: engines only, no learner."""
    if config.data.evaluation is None or not config.reward.functions:
        raise ConfigError(
            "an evaluation needs data.evaluation and reward.functions; one of them is not set"
        )
    with generation_run(in_own_folder(config, rollout_only=True)) as generation:
        generation.evaluator.evaluate(0)
    return 0


def in_own_folder(config: Config, **changes) -> Config:
    """The config with a run folder of its own, so that evaluations and checks neither meet a run
    nor overwrite each other.
    """
    now = time.strftime("%Y%m%d-%H%M%S")
    name = new_folder(config.run.dir, f"{config.run.name}-{now}")
    run = replace(config.run, name=name, resume=False, **changes)
    return replace(config, run=run)


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
    with training_run(in_own_folder(config)) as training:
        components = training.components
        for label, version in (("weights as loaded", 0), ("after a sync", 1)):
            components.sync.publish(version)
            rows = sampled_rows(components, version)
            gap = components.sync.gap(rows, version, config.rollout.temperature)
            components.display.message(
                f"{label}: {gap.tokens} tokens   max gap {gap.max:.3g}   mean gap {gap.mean:.3g}"
            )
            components.sync.check_gap(gap, version)
    return 0


def sampled_rows(components: Components, version: int) -> list[Row]:
    """One batch of prompts, sampled with the weights the engines have."""
    rollout = components.config.rollout
    producer = components.producer
    assert producer.prompts is not None, "checked by check_logprobs"
    budget = Budget(1, rollout.samples_per_prompt, 0, 1)
    prompts = producer.prompts.take(rollout.prompts_per_step)
    futures = []
    for i, prompt in enumerate(prompts):
        sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, seed=i)
        number = i + version * group_numbers.CHECK_STRIDE
        request = components.method.request(number, prompt, sampling, 0, budget)
        futures.append(producer.pool.submit(request))
    rows = []
    for future in futures:
        for trajectory in future.result():
            rows.append(policy_row(trajectory, 0.0, "policy"))
    return rows
