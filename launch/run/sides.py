"""The two sides of a run: the pool of rollout engines, and the learner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any

from tandem.algorithms.base import Method
from tandem.engine.config.schema import Config
from tandem.engine.learner.inline import InlineLearner
from tandem.engine.learner.protocol import Learner, PolicySpec, Pool
from tandem.engine.learner.ray import RayLearner
from tandem.launch import placement
from tandem.launch.placement import Placement
from tandem.launch.run.prepare import Prepared
from tandem.rollout.local import LocalPool
from tandem.rollout.no_engines import NoEngines
from tandem.rollout.pool import EnginePool

Maker = Callable[[Prepared, Placement | None], Any]  # of something that has `close`


def start_placement(prepared: Prepared, stack: ExitStack) -> Placement | None:
    """Where the processes of mode=cluster will run; None for mode=inline."""
    if prepared.config.mode == "inline":
        return None
    folder = prepared.folder.path
    place = placement.start(prepared.config, folder, prepared.display.message)
    stack.callback(place.close)
    return place


def make_pool(prepared: Prepared, place: Placement | None) -> Pool:
    if not prepared.generates:
        return NoEngines()
    config = prepared.config
    if place is None or config.rollout.backend == "replay":
        return LocalPool.start(config, prepared.model_path)
    return EnginePool.start(config, prepared.model_path, place, prepared.folder.path)


def make_learner(prepared: Prepared, place: Placement | None) -> Learner:
    config = prepared.config
    spec = policy_spec(prepared.method)
    if place is None:
        return InlineLearner.start(config, prepared.model_path, spec)
    return RayLearner.start(config, prepared.model_path, spec, place, prepared.folder.path)


def policy_spec(method: Method) -> PolicySpec:
    """What the learner's policy needs for a method."""
    return PolicySpec(
        critic=method.critic, embedding=method.embedding, uses_rollouts=method.uses_rollouts
    )


def start_sides(prepared: Prepared, makers: Sequence[Maker], stack: ExitStack) -> list[Any]:
    """What `makers` make, in their order; `stack` closes it."""
    place = start_placement(prepared, stack)
    if in_turn(prepared.config):
        made = []
        for make in makers:
            side = make(prepared, place)
            stack.callback(side.close)
            made.append(side)
    else:
        made = side_by_side(prepared, place, makers, stack)
    if place is None:
        import torch

        # holds for the thread that calls it, and the loop runs in this one
        torch.set_num_threads(prepared.config.cluster.threads)
    return made


def in_turn(config: Config) -> bool:
    """Whether one side waits for the other: transformers cannot load two models in one process at
    once, and a vLLM engine measures its GPU while nobody else takes memory of it.
    """
    if config.mode == "inline":
        return True
    return config.cluster.colocate and config.cluster.engine_gpus > 0


def side_by_side(
    prepared: Prepared,
    place: Placement | None,
    makers: Sequence[Maker],
    stack: ExitStack,
) -> list[Any]:
    """Each in a thread.

    All are waited for, also when one fails or a signal stops the start, so that none is left
    behind.
    """
    threads = ThreadPoolExecutor(len(makers))
    futures = [threads.submit(make, prepared, place) for make in makers]
    try:
        wait(futures)
    finally:
        threads.shutdown()
        for future in futures:
            if future.exception() is None:
                stack.callback(future.result().close)
    return [future.result() for future in futures]
