"""What a run needs before its engines and its learner: opened and checked, cheapest checks first.

Everything that can fail because of the user's input fails here.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tandem.algorithms.base import Budget, Method
from tandem.algorithms.checks.method import check_demand
from tandem.algorithms.registry import configured
from tandem.engine.config.names import ALWAYS_THERE
from tandem.engine.config.schema import Config, DataConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Finish, Prompt
from tandem.engine.data import templates
from tandem.engine.data.decoding import response_text
from tandem.engine.data.sources import recorded_date
from tandem.engine.loop.checkpoint import Checkpoints, Found
from tandem.engine.loop.disk import check_room
from tandem.engine.loop.state import read_state
from tandem.engine.model.resolve import load_tokenizer, read_config, resolve_model, vocabulary_size
from tandem.engine.model.scope import check_scope
from tandem.engine.report.display import Display
from tandem.launch.machine import check_model, check_models_beside, generates, parameter_count
from tandem.launch.reservation import preflight
from tandem.launch.run import resume
from tandem.launch.run.content import contents
from tandem.launch.run.folder import RunFolder
from tandem.launch.run.inputs import Sources, open_sources
from tandem.rollout.rewards.answers import check_answers
from tandem.rollout.rewards.runner import RewardRunner


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    config: Config
    folder: RunFolder
    display: Display
    checkpoints: Checkpoints
    checkpoint: Found | None  # the checkpoint to go on from
    method: Method
    model_path: str
    tokenizer: Any
    sources: Sources
    budget: Budget
    held_out: list[Prompt]  # to evaluate on
    rewards: RewardRunner | None

    @property
    def generates(self) -> bool:
        """Whether the run needs rollout engines, or recorded rollouts in their place."""
        return generates(self.config) or self.config.rollout.backend == "replay"

    def decode(self, tokens: np.ndarray, finish: Finish = Finish.STOP) -> str:
        return response_text(self.tokenizer, tokens, finish)


def prepare(config: Config, folder: RunFolder, display: Display, stack: ExitStack) -> Prepared:
    """What it starts ends with `stack`. Raises ConfigError."""
    stack.callback(templates.WORKER.stop)
    checkpoints = Checkpoints(
        folder.path / "checkpoints", config.run.keep_checkpoints, display.message
    )
    found = find_checkpoint(checkpoints) if folder.resumes else None
    before = None
    if found:
        before = resume.facts_before(found.folder, folder.path)
        resume.check_fixed(config, before, found.step)

    method = configured(config.method)
    model_path = resolve_model(config.model)
    tokenizer = load_tokenizer(config.model)
    check_model(config, model_path)
    check_models_beside(config, tokenizer)
    trained = check_scope(config, model_path)
    parameters = parameter_count(Path(model_path))
    check_room(config, parameters, folder.path, display.message, trained)
    if config.mode == "cluster":
        preflight(config, model_path)

    sources = open_sources(config, data_config(config, found), method, tokenizer)
    budget = Budget(
        prompts=config.rollout.prompts_per_step,
        samples=config.rollout.samples_per_prompt,
        experts=config.data.experts_per_step,
        steps=config.run.steps,
        seed=config.run.seed,
        model=model_path,
        codec=sources.codec(),
        max_prompt_tokens=config.data.max_prompt_tokens,
        vocabulary=vocabulary_size(read_config(config.model, model_path)),
        sources=sources.lengths(),
        models=(*ALWAYS_THERE, *config.models),
    )
    check_demand(method, method.demand(0, budget, {}), budget.sources)
    content = contents(config, sources.by_key(), model_path)
    facts = resume.facts_of(config, content)
    checkpoints.facts = {"id": folder.run_id, **asdict(facts)}
    if before is not None:
        for text in resume.check_changes(config, before, facts):
            display.message(text)
    held_out = []
    if sources.evaluation is not None:
        rows = len(sources.evaluation)
        limit = config.eval.limit or rows
        held_out = sources.evaluation.take(min(rows, limit))
    for line in sources.describe():
        display.message(line)

    return Prepared(
        config=config,
        folder=folder,
        display=display,
        checkpoints=checkpoints,
        checkpoint=found,
        method=method,
        model_path=model_path,
        tokenizer=tokenizer,
        sources=sources,
        budget=budget,
        held_out=held_out,
        rewards=start_rewards(config, folder, sources, held_out, stack),
    )


def find_checkpoint(checkpoints: Checkpoints) -> Found:
    """The one to go on from. Raises ConfigError if none is complete."""
    found = checkpoints.latest()
    if found is None:
        raise ConfigError(
            f"{checkpoints.folder} holds no complete checkpoint, all there are "
            "damaged (see above); to start from the beginning "
            "choose another run.name, or move that folder away"
        )
    return found


def data_config(config: Config, found: Found | None) -> DataConfig:
    """config.data; templates of a resumed run tell the date on which it first started."""
    if config.data.template_date is not None or found is None:
        return config.data
    cursors = read_state(found.folder)["cursors"]
    return replace(config.data, template_date=recorded_date(cursors))


def start_rewards(
    config: Config,
    folder: RunFolder,
    sources: Sources,
    held_out: list[Prompt],
    stack: ExitStack,
) -> RewardRunner | None:
    """Start the reward functions and try them on the data. Raises ConfigError."""
    functions = config.reward.functions
    if not functions:
        return None
    inline = config.mode == "inline"
    log = None if inline else folder.path / "logs" / "rewards.log"
    rewards = RewardRunner(config.reward, config.run.seed, inline=inline, log=log)
    stack.callback(rewards.close)
    for prompt in held_out[:1]:
        rewards.require_columns(prompt.columns)
    if config.reward.check_answers:
        check_answers(functions, sources.prompts, "data.prompts")
        check_answers(functions, sources.expert_prompts, "data.experts")
        check_answers(functions, sources.evaluation, "data.evaluation")
    return rewards
