"""Row makers: from trajectories and demonstrations to the rows that are trained on."""

from __future__ import annotations

import dataclasses

import numpy as np

from tandem.engine.core.types import Finish, Row, ScoredGroup, Source, Trajectory


def policy_row(trajectory: Trajectory, advantage: float, term: str) -> Row:
    """A rollout as a training row: every sampled token gets the sequence's advantage and weight 1
    in `term`.
    """
    mask = (trajectory.source == Source.POLICY).astype(np.float32)
    return Row(
        tokens=trajectory.tokens,
        source=trajectory.source,
        weights={term: mask},
        streams={
            "advantage": mask * np.float32(advantage),
            "behaviour_logp": trajectory.behaviour_logp,
        },
        version=trajectory.version,
        group=trajectory.group,
        prompt_id=trajectory.prompt_id,
    )


def expert_row(trajectory: Trajectory, term: str) -> Row:
    """A demonstration as a training row: every expert token gets weight 1 in `term`."""
    mask = (trajectory.source == Source.EXPERT).astype(np.float32)
    return Row(
        tokens=trajectory.tokens,
        source=trajectory.source,
        weights={term: mask},
        prompt_id=trajectory.prompt_id,
    )


def turn_of_token(trajectory: Trajectory) -> np.ndarray:
    """int [T]: of which trained turn of a demonstration a token is, the first being 0; -1 for
    context. Headers stand between any two turns.
    """
    trained = trajectory.source == Source.EXPERT
    begins = trained & ~np.append(False, trained[:-1])
    return np.where(trained, np.cumsum(begins) - 1, -1)


def demonstration(group: ScoredGroup) -> Trajectory:
    """A prompt's demonstration, which it must have, as a trajectory of the group."""
    prompt, response = group.prompt.tokens, group.prompt.demonstration
    assert response is not None, f"prompt {group.prompt.id!r} has no demonstration"
    source = np.full(len(prompt) + len(response), Source.EXPERT, np.int8)
    source[: len(prompt)] = Source.PROMPT
    tokens = np.concatenate([prompt, response]).astype(np.int32)
    return Trajectory(group.prompt.id, tokens, source, Finish.STOP, group=group.group)


def with_demonstration(group: ScoredGroup, reward: float | None) -> ScoredGroup:
    """The group with its prompt's demonstration as one more trajectory, last; unchanged where there
    is none or it has no reward.
    """
    if group.prompt.demonstration is None or reward is None:
        return group
    return dataclasses.replace(
        group,
        trajectories=(*group.trajectories, demonstration(group)),
        rewards=np.append(np.asarray(group.rewards, np.float64), reward),
    )
