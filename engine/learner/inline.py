"""The learner of mode=inline: one rank in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from tandem.engine.config.names import POLICY
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.outcomes import Delivery
from tandem.engine.core.process import keep_freed_memory
from tandem.engine.core.types import Row
from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.protocol import PolicySpec, Pool
from tandem.engine.learner.rank import LearnerRank, build_policy, merge_rank_streams
from tandem.engine.model.quantities import Quantity
from tandem.engine.weights.digest import digest
from tandem.engine.weights.verify import Synced


def deliver(named: Sequence[tuple[str, Tensor]], pool: Pool, version: int) -> Delivery:
    """Hand tensors to the backend of a pool in this process."""
    installed = pool.install(named, version)
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
        self.rank = rank
        self.pool: Pool | None = None
        self.synced: Synced | None = None
        self.shares_prompts = rank.shares_prompts()
        self.step = rank.step
        self.set_reference = rank.set_reference
        self.save, self.load, self.export = rank.save, rank.load, rank.export
        self.release_memory = rank.release_memory
        self.close = rank.close

    @classmethod
    def start(cls, config: Config, model_path: str, spec: PolicySpec) -> InlineLearner:
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
        engine = LocalEngine(build_policy(config, model_path, spec), config.learner, gpu)
        return cls(LearnerRank(config, model_path, spec, engine))

    def logprobs(
        self, rows: Sequence[Row], temperature: float, model: str = POLICY
    ) -> list[np.ndarray]:
        """The log-probs of `compute_streams`."""
        return self.compute_streams(rows, temperature, model)["logp"]

    def compute_streams(
        self,
        rows: Sequence[Row],
        temperature: float,
        model: str = POLICY,
        quantities: Mapping[str, Quantity] | None = None,
    ) -> dict[str, list[np.ndarray]]:
        """See LearnerRank.compute_streams."""
        found = self.rank.compute_streams(rows, temperature, model, quantities)
        return merge_rank_streams([found])

    def connect(self, pool: Pool) -> None:
        self.pool = pool

    def send(self, version: int) -> Delivery:
        """Give the pool the present weights."""
        assert self.pool is not None, "connect comes first"
        return deliver(list(self.rank.engine.full_parameters()), self.pool, version)

    def rss(self) -> list[int]:
        """Bytes of memory per rank."""
        return [self.rank.rss()]
