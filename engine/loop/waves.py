"""Waves: what a method asks for again once a group is scored, and what becomes of the group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tandem.algorithms.base import Budget, Method
from tandem.algorithms.checks.waves import check_again
from tandem.engine.core.types import GenRequest, ScoredGroup, Trajectory
from tandem.engine.loop.tickets import GroupSlot


def next_wave(
    method: Method, group: ScoredGroup, request: GenRequest, budget: Budget
) -> GenRequest | None:
    """The request of the group's next wave, sampled with numbers of its own; None if the method is
    content with the group as it is.
    """
    wave = request.wave + 1
    asked = check_again(method, method.again(group, wave, request, budget), request, budget)
    if asked is None:
        return None
    seed = sampling_seed(budget.seed, request.group, wave)
    sampling = replace(asked.sampling, seed=seed)
    return replace(asked, sampling=sampling, wave=wave, attempt=0)


def sampling_seed(*numbers: int) -> int:
    """Of one request, from the run's seed and the numbers that tell the request apart."""
    seeds = np.random.SeedSequence(numbers)
    return int(seeds.generate_state(1)[0] >> 1)


def after_wave(slot: GroupSlot, wave: ScoredGroup | None, joins: bool) -> ScoredGroup | None:
    """The group of a slot whose rollouts were scored. None: they are its first, and none of them
    has a usable reward; a later wave of that kind leaves the group as it was.
    """
    before, number = slot.earlier, slot.request.wave
    if before is None:
        return wave
    if wave is None:
        unscored = (*before.unscored, *slot.generation.result())
        return replace(before, waves=number, unscored=unscored)
    return joined(before, replace(wave, waves=number), joins)


def joined(before: ScoredGroup, wave: ScoredGroup, joins: bool) -> ScoredGroup:
    """The group after one more wave."""
    if not joins:
        earlier = (*before.earlier, replace(before, earlier=()))
        return replace(wave, earlier=earlier)
    prompts = []
    for group in (before, wave):
        for sample in range(len(group.trajectories)):
            prompts.append(group.prompt_of(sample))
    return replace(
        before,
        trajectories=before.trajectories + wave.trajectories,
        rewards=np.concatenate([before.rewards, wave.rewards]),
        outcomes=before.outcomes + wave.outcomes,
        texts=before.texts + wave.texts,
        waves=wave.waves,
        prompts=tuple(prompts),
    )


def every_trajectory(group: ScoredGroup) -> Iterator[Trajectory]:
    """Those of the waves that it took the place of too, and of those without a usable reward."""
    for one in (*group.earlier, group):
        yield from one.trajectories
        yield from one.unscored


def first_rewards(group: ScoredGroup) -> np.ndarray:
    """float32 [n]: the rewards of the group's first wave."""
    if group.earlier:
        return group.earlier[0].rewards
    first = [trajectory.wave == 0 for trajectory in group.trajectories]
    return group.rewards[first]
