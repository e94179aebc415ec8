"""Token objectives: pure functions from what is known about the trained tokens of a micro-batch to
a loss per token.

An objective is a frozen dataclass (its fields are its constants) with `__call__(tokens: Tokens) ->
(loss [n], {metric: [n]})`. What it reports of m of its tokens alone stands a level deeper, {part:
{metric: [m]}}, and is averaged over those. The loss must be differentiable in `tokens.logp`;
everything else is data. Weights, reductions and coefficients are applied outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# log-ratios are clamped to +-20 before exp, as in verl: e^20 is already far outside any clip range
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one micro-batch, flat. Streams that no row has are None; `tokens[name]`
    is a stream that must be there.
    """

    logp: Tensor  # float32 [n], requires grad
    # int64 [n] row number, 0-based: tokens of a row stand together
    segment: Tensor
    group: Tensor  # int64 [n]
    source: Tensor  # int8 [n]
    advantage: Tensor | None = None  # float32 [n]
    # float32 [n]; None means: this forward is the first since the snapshot, so old == sg[logp]
    old_logp: Tensor | None = None
    # float32 [n], NaN on tokens that no rollout engine sampled
    behaviour_logp: Tensor | None = None
    ref_logp: Tensor | None = None  # float32 [n]
    entropy: Tensor | None = None  # float32 [n]
    # float32 [n], requires grad: the critic's present value of the state in which the token was
    # chosen
    value: Tensor | None = None
    old_value: Tensor | None = None  # float32 [n] the same before the update
    returns: Tensor | None = None  # float32 [n]
    # {name: float32 [n]} from a method's own forward
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        """A stream of the tokens or of `extra`. Raises KeyError if it is absent."""
        stream = self.extra.get(name, getattr(self, name, None))
        if stream is None:
            raise KeyError(f"no token has {name!r}")
        return stream

    @property
    def old(self) -> Tensor:
        """log pi_old: the snapshot's log-prob where the plan has one, else the present one without
        gradient.
        """
        present = self.logp.detach()
        if self.old_logp is None:
            return present
        missing = torch.isnan(self.old_logp)
        return torch.where(missing, present, self.old_logp)

    def take(self, index: Tensor) -> Tokens:
        """The same tokens, `index` (int64 [m]) of them."""
        streams = {}
        for name, stream in vars(self).items():
            if isinstance(stream, Tensor):
                streams[name] = stream[index]
        extra = {name: stream[index] for name, stream in self.extra.items()}
        return Tokens(**streams, extra=extra)


@dataclass(frozen=True, eq=False)
class Before:
    """What is known of a row's n tokens in a term before the update."""

    logp: np.ndarray  # float32 [n], the present policy's
    ref_logp: np.ndarray | None = None  # float32 [n]


Objective = Callable[[Tokens], tuple[Tensor, Mapping]]


def clamped_exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def segment_sum(values: Tensor, segment: Tensor) -> Tensor:
    """[n, ...] -> [rows, ...]: the sum over each row's tokens."""
    shape = (row_count(segment), *values.shape[1:])
    total = torch.zeros(shape, device=values.device)
    return total.index_add(0, segment, values)


def segment_softmax(values: Tensor, segment: Tensor) -> Tensor:
    """[n] -> [n]: the softmax over each row's tokens."""
    top = torch.full((row_count(segment),), -torch.inf, device=values.device)
    top = top.scatter_reduce(0, segment, values.detach(), "amax")
    powers = (values - top[segment]).exp()
    total = segment_sum(powers, segment)
    return powers / total[segment]


def segment_mean(values: Tensor, segment: Tensor) -> Tensor:
    """[n] -> [n]: every token gets the mean over its row's tokens."""
    ones = torch.ones_like(values)
    count = segment_sum(ones, segment)
    total = segment_sum(values, segment)
    mean = total / count.clamp(min=1.0)
    return mean[segment]


def row_count(segment: Tensor) -> int:
    if len(segment) == 0:
        return 0
    return int(segment.max()) + 1
