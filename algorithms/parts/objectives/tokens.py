"""Token objectives: pure functions from what is known about the trained tokens of a micro-batch to
a loss per token.

An objective is a frozen dataclass (its fields are its constants) with `__call__(tokens: Tokens) ->
(loss [n], {metric: [n]})`. What it reports of m of its tokens alone stands a level deeper, {part:
{metric: [m]}}, and is averaged over those. The loss must be differentiable in `tokens.logp`;
everything else is data. Weights, reductions and coefficients are applied outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

# log-ratios are clamped to +-20 before exp, as in verl: e^20 is already far outside any clip range
LOG_RATIO_LIMIT = 20.0

TOKEN_FIELDS = ("logp", "segment", "group", "source")
# Streams by who makes them. All others are the rows' own, from `Method.rows` or `credit`.
MODEL_STREAMS = ("entropy", "value")  # the model in the update itself, for terms that need them
SCORED_STREAMS = ("old_logp", "ref_logp", "old_value")  # the loop, before `credit`, likewise
PARTIAL_STREAMS = ("behaviour_logp",)  # rollouts; NaN where no engine sampled the token


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one micro-batch, flat.

    `streams` are those of the rows (see Row.streams), NaN on tokens of a row without, and what the
    model says beside the log-prob where a term asked for it: `entropy`, `value` (the critic's
    present value of the state in which the token was chosen) and those of a method's own forward.
    `tokens[name]` is one that must be there, `name in tokens` says whether it is.
    """

    logp: Tensor  # float32 [n], requires grad
    # int64 [n] row number, 0-based: tokens of a row stand together
    segment: Tensor
    group: Tensor  # int64 [n]
    source: Tensor  # int8 [n]
    streams: Mapping[str, Tensor] = field(default_factory=dict)  # {name: float32 [n]}

    def __len__(self) -> int:
        return len(self.logp)

    def __getitem__(self, name: str) -> Tensor:
        """A stream. Raises KeyError if it is absent."""
        if name not in self.streams:
            raise KeyError(f"no token has {name!r}")
        return self.streams[name]

    def __contains__(self, name: str) -> bool:
        return name in self.streams

    @property
    def old(self) -> Tensor:
        """log pi_old: the snapshot's log-prob where the plan has one, else the present one without
        gradient.
        """
        present = self.logp.detach()
        if "old_logp" not in self:
            return present
        missing = torch.isnan(self["old_logp"])
        return torch.where(missing, present, self["old_logp"])

    def take(self, index: Tensor) -> Tokens:
        """The same tokens, `index` (int64 [m]) of them."""
        return Tokens(
            logp=self.logp[index],
            segment=self.segment[index],
            group=self.group[index],
            source=self.source[index],
            streams={name: stream[index] for name, stream in self.streams.items()},
        )

    def renumbered(self, segment: Tensor) -> Tokens:
        """The tokens with these row numbers, int64 [n]."""
        return replace(self, segment=segment)

    def with_streams(self, **streams: Tensor) -> Tokens:
        """The tokens with these streams, in the place of those of the same name."""
        return replace(self, streams={**self.streams, **streams})


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
