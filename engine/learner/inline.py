"""The learner of mode=inline: one rank in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.process import keep_freed_memory
from tandem.engine.core.types import (
    Delivery,
)
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.weights.digest import digest


def deliver(
    named: Sequence[tuple[str, torch.Tensor]], backends: Sequence, version: int
) -> Delivery:
    """Hand tensors to backends of this process."""
    installed = []
    for backend in backends:
        asyncio.run(backend.start_weight_update())
        asyncio.run(backend.update_weights({"named": named}))
        installed.append(asyncio.run(backend.finish_weight_update(version)))
    return Delivery(
        {name: digest(tensor) for name, tensor in named},
        installed,
        sum(t.numel() * t.element_size() for _, t in named),
    )


class InlineLearner:
    """The learner of mode=inline: one rank in this process, weights handed to the pool's backends
    directly.
    """

    ranks = 1

    def __init__(self, rank: LearnerRank):
        self.rank, self.pool, self.synced = rank, None, None
        self.shares_prompts = rank.shares_prompts()
        self.step, self.logprobs, self.streams, self.set_reference = (
            rank.step,
            rank.logprobs,
            rank.streams,
            rank.set_reference,
        )
        self.save, self.load, self.export, self.close = (
            rank.save,
            rank.load,
            rank.export,
            rank.close,
        )

    @classmethod
    def start(cls, config: Config, model_path: str) -> InlineLearner:
        """Raises ConfigError if cluster.learner_gpus asks for a GPU that is not there."""
        gpu = config.cluster.learner_gpus > 0
        if gpu and not torch.cuda.is_available():
            raise ConfigError(
                f"cluster.learner_gpus is {config.cluster.learner_gpus:g}, but torch finds "
                "no GPU here; set it to 0"
            )
        if not gpu:
            keep_freed_memory()
        torch.set_num_threads(config.cluster.threads)
        torch.manual_seed(config.run.seed)
        return cls(
            LearnerRank(
                config,
                model_path,
                LocalEngine(build_policy(config, model_path), config.learner, gpu),
            )
        )

    def connect(self, pool) -> None:
        self.pool = pool

    def send(self, version: int) -> Delivery:
        """Put the present weights into every backend of the pool."""
        return deliver(list(self.rank.engine.full_parameters()), self.pool.backends, version)

    def rss(self) -> list[int]:
        """Bytes of memory per rank."""
        return [self.rank.rss()]
