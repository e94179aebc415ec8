"""Hand-made sequences, pairs and groups, for `inspect`, tests and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tandem.engine.core.types import Finish, Prompt, ScoredGroup, Source, Trajectory


def trajectory(
    prompt: Sequence[int],
    response: Sequence[int],
    behaviour_logp: Sequence[float] | None = None,
    expert: bool = False,
    version: int = 0,
    finish: Finish = Finish.STOP,
    prompt_id: str = "p",
    group: int = 0,
) -> Trajectory:
    """A hand-made sequence: prompt ids (one at least: the first token has no log-prob), response
    ids, and for rollouts the engine's log-prob of each response token (0 if not given).
    """
    n, m = len(prompt), len(response)
    if n == 0:
        raise ValueError(
            "trajectory: the prompt is empty, expected at least one token: the first of a sequence "
            "has no log-prob, so it cannot be trained"
        )
    if behaviour_logp is not None and len(behaviour_logp) != m:
        raise ValueError(
            f"trajectory: behaviour_logp has {len(behaviour_logp)} entries, expected {m}: one per "
            "token of the response, none for the prompt"
        )
    source = np.full(n + m, Source.EXPERT if expert else Source.POLICY, np.int8)
    source[:n] = Source.PROMPT
    logp = np.full(n + m, np.nan, np.float32)
    versions = np.full(n + m, -1, np.int32)
    if not expert:
        logp[n:] = 0.0 if behaviour_logp is None else behaviour_logp
        versions[n:] = version
    return Trajectory(
        prompt_id=prompt_id,
        tokens=np.array([*prompt, *response], np.int32),
        source=source,
        finish=finish,
        behaviour_logp=logp,
        version=versions,
        group=-1 if expert else group,
    )


def pair(
    prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], number: int = 0
) -> tuple[Trajectory, Trajectory]:
    """Two hand-made answers to one prompt, for Batch.experts; `number` tells pairs apart."""
    better = trajectory(prompt, chosen, expert=True)
    worse = trajectory(prompt, rejected, expert=True)
    return (
        replace(better, group=number, role="chosen"),
        replace(worse, group=number, role="rejected"),
    )


def group(
    trajectories: Sequence[Trajectory],
    rewards: Sequence[float],
    demonstration: Sequence[int] | None = None,
    number: int = 0,
    demonstration_reward: float | None = None,
) -> ScoredGroup:
    """Hand-made rollouts of one prompt with their rewards; response ids of the prompt's
    demonstration, and its reward for methods that score it (LUFFY, SRFT, ViSurf: without one it
    takes no part, as where its reward function fails).

    `number` tells the groups of a batch apart.
    """
    if not trajectories:
        raise ValueError(
            "group: no trajectories, expected at least one; a prompt that nothing was sampled for "
            "is no group"
        )
    prompts = [t.tokens[t.source == Source.PROMPT].tolist() for t in trajectories]
    for i, prompt in enumerate(prompts):
        if prompt != prompts[0]:
            raise ValueError(
                f"group: trajectory {i} continues prompt {prompt}, trajectory 0 prompt "
                f"{prompts[0]}; a group is of one prompt"
            )
        if (trajectories[i].source == Source.EXPERT).any():
            raise ValueError(
                f"group: trajectory {i} is a demonstration; give its response as "
                "demonstration=[...] here, or the whole of it in Batch.experts"
            )
    values = np.array(rewards, np.float32)
    if values.shape != (len(trajectories),) or not np.isfinite(values).all():
        raise ValueError(
            f"group: rewards are {values.tolist()}, expected one finite number for each of the "
            f"{len(trajectories)} trajectories"
        )
    demonstrated = None
    if demonstration is not None:
        if len(demonstration) == 0:
            raise ValueError(
                "group: the demonstration is empty, expected at least one token, or None for a "
                "prompt that has none"
            )
        demonstrated = np.array(demonstration, np.int32)
    prompt = Prompt(
        id=trajectories[0].prompt_id,
        tokens=np.array(prompts[0], np.int32),
        content="",
        columns={},
        demonstration=demonstrated,
    )
    return ScoredGroup(
        group=number,
        prompt=prompt,
        trajectories=tuple(replace(t, group=number) for t in trajectories),
        rewards=values,
        demonstration_reward=demonstration_reward,
    )
