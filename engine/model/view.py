"""What a policy is asked about one micro-batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tandem.engine.model.measured_head import HeadInputs
from tandem.engine.model.quantities import Quantity


@dataclass(frozen=True, eq=False)
class View:
    """The bins of a micro-batch and its n trained tokens, as tensors on the policy's device; see
    MicroBatch.

    A row's last trained token is a target, but not among the tokens: behind its position another
    row begins.
    """

    tokens: Tensor  # int64 [B, L]
    positions: Tensor  # int64 [B, L]
    index: Tensor  # int64 [n]: flat positions in the bins of the hidden states that predict
    target: Tensor  # int64 [n]
    segment: Tensor  # int64 [n]
    group: Tensor  # int64 [n]
    source: Tensor  # int8 [n]
    prompt_blocks: Tensor | None = None  # int64 [2, B, L]
    temperature: float = 1.0
    chunk: int = 1024  # tokens whose logits are in memory at a time
    entropy: bool = False  # whether token entropies are asked for
    # what else is asked for, by name; `data` and `others` are what these read: per-token tensors,
    # and other models at the same tokens (see engine/model/measured_head.py)
    quantities: Mapping[str, Quantity] = field(default_factory=dict)
    data: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, HeadInputs] = field(default_factory=dict)

    @classmethod
    def of_one_row(
        cls,
        tokens: Tensor,
        positions: Tensor,
        index: Tensor,
        target: Tensor,
        prompt_blocks: Tensor | None = None,
    ) -> View:
        """For those who want log-probs at temperature 1 and nothing else: all trained tokens count
        as one row of no group.
        """
        segment = torch.zeros_like(target)
        return cls(
            tokens,
            positions,
            index,
            target,
            segment=segment,
            group=segment - 1,
            source=segment.to(torch.int8),
            prompt_blocks=prompt_blocks,
        )
