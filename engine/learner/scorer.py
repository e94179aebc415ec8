"""Log-probs and entropies of rows under a model that nothing trains, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.engine.core.types import NO_VERSION, MicroBatch, Row
from tandem.engine.learner.packing import pack
from tandem.engine.model.policy import Policy
from tandem.engine.model.view import View


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model says of the n trained tokens of a row, at temperature 1."""

    logp: np.ndarray  # float32 [n]
    entropy: np.ndarray | None  # float32 [n], in nats; None: not asked for


@dataclass(frozen=True, eq=False)
class Scorer:
    """chunk: tokens whose logits are in memory at a time."""

    policy: Policy
    device: torch.device
    micro_batch_tokens: int
    chunk: int
    entropy: bool = False

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row], term: str) -> list[Measured]:
        """For each row, of its tokens in `term`; each must have one at least."""
        micro_batches = pack(
            rows,
            [Term(term, NLL())],  # only which tokens count is read of it
            1,
            self.micro_batch_tokens,
            version=NO_VERSION,
            share_prompts=self.policy.shares_prompts,
        )[0]
        found: dict[int, Measured] = {}
        for micro in micro_batches:
            out = self.policy(self.view(micro))
            logp = out["logp"].float().cpu().numpy()
            entropy = out["entropy"].float().cpu().numpy() if self.entropy else None
            for segment, i in enumerate(micro.rows):
                mine = micro.segment == segment
                found[i] = Measured(logp[mine], None if entropy is None else entropy[mine])
        return [found[i] for i in range(len(rows))]

    def view(self, micro: MicroBatch) -> View:
        def on_device(array: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(array, device=self.device)

        blocks = micro.prompt_blocks
        view = View.of_one_row(
            on_device(micro.tokens),
            on_device(micro.positions),
            on_device(micro.index),
            on_device(micro.target),
            None if blocks is None else on_device(blocks),
        )
        return replace(view, chunk=self.chunk, entropy=self.entropy)
