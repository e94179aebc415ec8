"""Lines of rollouts.jsonl: from a scored group to a line, and from a line to carriers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.secrets import redact
from tandem.engine.core.files import read_jsonl
from tandem.engine.core.types import Finish, Prompt, RewardError, ScoredGroup, Source, Trajectory
from tandem.engine.report.lines import plain_columns


def rollout_record(
    group: ScoredGroup, sample: int, columns: tuple[dict, list[str]] | None = None
) -> dict[str, Any]:
    """One trajectory of a scored group as rollouts.jsonl has it, without the step and the learner's
    version.

    columns: `plain_columns` of the group's row, made once for all its samples.
    """
    prompt = group.prompt_of(sample)
    trajectory = group.trajectories[sample]
    row, shortened = columns or plain_columns(prompt.columns)
    marks: dict[str, Any] = {"cut": shortened} if shortened else {}
    if trajectory.wave:
        marks["wave"] = trajectory.wave
    if group.waves:
        marks["waves"] = group.waves
    outcome = group.outcomes[sample] if group.outcomes else None
    return {
        "group": group.group,
        "sample": sample,
        "prompt_id": prompt.id,
        "prompt": prompt.content,
        "columns": row,
        **marks,
        "demonstration": prompt.demonstration,
        "text": group.texts[sample] if group.texts else None,
        "tokens": trajectory.tokens,
        "source": trajectory.source,
        "behaviour_logp": trajectory.behaviour_logp,
        "version": trajectory.version,
        "finish": trajectory.finish.value,
        "reward": group.rewards[sample],
        "parts": outcome.parts if outcome else {},
        "error": reward_error(outcome.error) if outcome and outcome.error else None,
    }


def read_rollouts(path: str | Path) -> Iterator[tuple[dict[str, Any], Prompt, Trajectory]]:
    """(the line itself, prompt, trajectory) of every line of a rollouts.jsonl, in order.

    Token ids, sources, versions and log-probs are exactly those that were written.
    """

    for line in read_jsonl(path):
        tokens = np.array(line["tokens"], np.int32)
        source = np.array(line["source"], np.int8)
        prompt = Prompt(
            id=line["prompt_id"],
            tokens=tokens[source == Source.PROMPT],
            content=line["prompt"],
            columns=line["columns"],
            demonstration=array_or_none(line["demonstration"], np.int32),
        )
        trajectory = Trajectory(
            prompt_id=prompt.id,
            tokens=tokens,
            source=source,
            finish=Finish(line["finish"]),
            group=line["group"],
            wave=line.get("wave", 0),
            behaviour_logp=array_or_none(line["behaviour_logp"], np.float32),
            version=array_or_none(line["version"], np.int32),
        )
        yield line, prompt, trajectory


def array_or_none(value: list | None, dtype: type) -> np.ndarray | None:
    """null in a list is NaN in a float array."""
    return None if value is None else np.array(value, dtype)


def reward_error(error: RewardError) -> dict[str, str]:
    """What went wrong in a reward, without secrets: a service may repeat the key it refuses."""
    return {**vars(error), "message": redact(error.message)}
