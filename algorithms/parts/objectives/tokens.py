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

# log-ratios are clamped to +-20 before exp, as in verl: e^20 is already far outside any clip range
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one micro-batch, flat. Streams that no row has are None; `tokens[name]`
    is a stream that must be there.
    """

    logp: torch.Tensor  # float32 [n], requires grad
    # int64 [n] row number, 0-based: tokens of a row stand together
    segment: torch.Tensor
    group: torch.Tensor  # int64 [n]
    source: torch.Tensor  # int8 [n]
    advantage: torch.Tensor | None = None  # float32 [n]
    # float32 [n]; None means: this forward is the first since the snapshot, so old == sg[logp]
    old_logp: torch.Tensor | None = None
    # float32 [n], NaN on tokens that no rollout engine sampled
    behaviour_logp: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None  # float32 [n]
    entropy: torch.Tensor | None = None  # float32 [n]
    # float32 [n], requires grad: the critic's present value of the state in which the token was
    # chosen
    value: torch.Tensor | None = None
    old_value: torch.Tensor | None = None  # float32 [n] the same before the update
    returns: torch.Tensor | None = None  # float32 [n]
    # {name: float32 [n]} from a method's own forward
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A stream of the tokens or of `extra`. Raises KeyError if it is absent."""
        stream = self.extra.get(name, getattr(self, name, None))
        if stream is None:
            raise KeyError(f"no token has {name!r}")
        return stream

    @property
    def old(self) -> torch.Tensor:
        """log pi_old: the snapshot's log-prob where the plan has one, else the present one without
        gradient.
        """
        if self.old_logp is None:
            return self.logp.detach()
        return torch.where(torch.isnan(self.old_logp), self.logp.detach(), self.old_logp)

    def take(self, index: torch.Tensor) -> Tokens:
        """The same tokens, `index` (int64 [m]) of them."""
        streams = {k: v[index] for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return Tokens(**streams, extra={k: v[index] for k, v in self.extra.items()})


@dataclass(frozen=True, eq=False)
class Before:
    """What is known of a row's n tokens in a term before the update."""

    logp: np.ndarray  # float32 [n], the present policy's
    ref_logp: np.ndarray | None = None  # float32 [n]


Objective = Callable[[Tokens], tuple[torch.Tensor, Mapping]]


def clamped_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def segment_sum(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[n, ...] -> [rows, ...]: the sum over each row's tokens."""
    rows = int(segment.max()) + 1 if len(segment) else 0
    total = torch.zeros(rows, *values.shape[1:], device=values.device)
    return total.index_add(0, segment, values)


def segment_softmax(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[n] -> [n]: the softmax over each row's tokens."""
    rows = int(segment.max()) + 1 if len(segment) else 0
    top = torch.full((rows,), -torch.inf, device=values.device)
    top = top.scatter_reduce(0, segment, values.detach(), "amax")
    powers = (values - top[segment]).exp()
    return powers / segment_sum(powers, segment)[segment]


def segment_mean(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[n] -> [n]: every token gets the mean over its row's tokens."""
    count = segment_sum(torch.ones_like(values), segment)
    return (segment_sum(values, segment) / count.clamp(min=1.0))[segment]
