"""Log-probs of tokens that the policy draws at every position, weighed by whether they are the
target: the quantities of One-Token Rollout (algorithms/parts/objectives/one_token.py).

With z the policy's final logits, p = softmax z, pi' = softmax(z / kappa) and R(a) = 1 for the
target, beta for all others:

    expected   sum_a sg[pi'(a)] R(a) log p(a)
    drawn      1/K sum_k R(a_k) log p(a_k),    a_1 .. a_K drawn from pi'

Both have dz = w - p sum w: w(a) is R(a) times pi'(a), or times the share of the draws that are a.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.model.quantities import Chunk

TARGET = "target"
DRAWS = "draws"  # a number of the token's own, from which its draws are made
MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class ExpectedReward:
    beta: float
    kappa: float
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = (TARGET,)

    def value(self, chunk: Chunk) -> Tensor:
        weighed = self.weights(chunk) * chunk.log_p
        return weighed.sum(-1)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        weights = self.weights(chunk)
        return slope_of(weights, chunk.log_p, grad)

    def weights(self, chunk: Chunk) -> Tensor:
        """[c, V]: pi'(a) R(a), a fresh tensor."""
        scaled = chunk.log_p / self.kappa
        flat = scaled.softmax(-1)
        return rewarded(flat, chunk.data[TARGET], self.beta)


@dataclass(frozen=True)
class DrawnReward:
    """`samples` draws with replacement, from the stream `draws`: float32 [n], whole numbers in
    [0, 2^24); NaN, on tokens of rows without, counts as 0.
    """

    beta: float
    kappa: float
    samples: int
    models: tuple[str, ...] = ()
    data: tuple[str, ...] = (TARGET, DRAWS)

    def value(self, chunk: Chunk) -> Tensor:
        weighed = self.weights(chunk) * chunk.log_p
        return weighed.sum(-1)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        weights = self.weights(chunk)
        return slope_of(weights, chunk.log_p, grad)

    def weights(self, chunk: Chunk) -> Tensor:
        """[c, V]: share of the draws times R(a), a fresh tensor."""
        scaled = chunk.log_p / self.kappa
        sums = scaled.softmax(-1)
        sums.cumsum_(-1)
        seeds = chunk.data[DRAWS]
        points = uniform(seeds, self.samples)
        total = sums[:, -1:]
        points = points.to(sums.dtype) * total
        ids = torch.searchsorted(sums, points, right=True)
        last_id = sums.shape[-1] - 1
        ids.clamp_(max=last_id)
        share = torch.full_like(points, 1.0 / self.samples)
        shares = sums.zero_()
        shares.scatter_add_(-1, ids, share)
        return rewarded(shares, chunk.data[TARGET], self.beta)


def rewarded(shares: Tensor, target: Tensor, beta: float) -> Tensor:
    """[c, V] times 1 at the target and beta elsewhere, in place."""
    index = target[:, None]
    of_target = shares.gather(-1, index)
    shares.mul_(beta)
    return shares.scatter_(-1, index, of_target)


def slope_of(weights: Tensor, log_p: Tensor, grad: Tensor) -> Tensor:
    """d sum_c grad_c sum_a w(a) log p(a) / dz; `weights` is overwritten."""
    total = weights.sum(-1, keepdim=True)
    p = log_p.exp()
    weights.sub_(p * total)
    return weights.mul_(grad[:, None])


def uniform(seeds: Tensor, count: int) -> Tensor:
    """[n] whole numbers -> [n, count] numbers in [0, 1), by a hash of each pair: the same on every
    device and in any micro-batch, which a generator's stream is not.
    """
    draw = torch.arange(count, device=seeds.device)
    seed = seeds.nan_to_num(nan=0.0)
    seed = seed.to(torch.int64)
    seed = seed[:, None]
    mixed = seed * 0x9E3779B1 + draw * 0x85EBCA6B
    mixed &= MASK32
    # two rounds of xor-shift and multiply in 32 bits, which int64 holds
    for shift, factor in ((16, 0x7FEB352D), (15, 0x6C8E9CF5)):
        mixed ^= mixed >> shift
        mixed *= factor
        mixed &= MASK32
    mixed ^= mixed >> 16
    bits = mixed >> 8  # 24 of them
    return bits.double() / (1 << 24)
