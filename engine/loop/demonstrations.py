"""The demonstrations of a step, drawn from the sources that the method asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tandem.algorithms.base import Demand, Method
from tandem.engine.config.names import DEFAULT_SOURCE
from tandem.engine.core.types import Trajectory
from tandem.engine.data.sources import ExpertSource
from tandem.engine.loop.group_numbers import PAIRS, PAIRS_STRIDE


def never_asked(method: Method, sources: Mapping[str, ExpertSource]) -> list[str]:
    """Names of the sources that nothing was drawn from in the whole run, before a resume too."""
    found = []
    for name, source in sources.items():
        with_prompts = name == DEFAULT_SOURCE and method.prompts_from_experts
        if source.cursor.drawn == 0 and not with_prompts:
            found.append(name)
    return found


def draw_demonstrations(
    method: Method, demand: Demand, sources: Mapping[str, ExpertSource]
) -> tuple[Trajectory, ...]:
    """Those that do not come with the prompts of the step's rollouts, in the demand's order."""
    found: list[Trajectory] = []
    for name, count in demand.by_source.items():
        if name == DEFAULT_SOURCE and method.prompts_from_experts:
            continue
        first = PAIRS + list(sources).index(name) * PAIRS_STRIDE
        for trajectory in sources[name].take(count):
            group = trajectory.group
            if group >= 0:  # of a pair, by its place in the source
                group += first
            found.append(replace(trajectory, dataset=name, group=group))
    return tuple(found)
