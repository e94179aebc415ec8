"""Merging models: the formulas, one tensor at a time (engine/model/merge_folders.py has the files).

With theta_0 the base, theta_i the models and tau_i = theta_i - theta_0:

    average   mean of theta_i                                 model soups, arXiv 2203.05482
    linear    sum w_i theta_i / sum w_i
    task      theta_0 + scale sum w_i tau_i                   task arithmetic, arXiv 2212.04089
    ties      theta_0 + scale tau                             TIES, arXiv 2306.01708
                trim: keep the share `density` of each tau_i that is largest by magnitude
                elect: gamma = sign(sum w_i tau_i); tau = sum w_i tau_i / sum w_i over the i whose
                trimmed tau_i has the sign gamma
    dare      theta_0 + scale sum w_i m_i tau_i / (1 - drop)  DARE, arXiv 2311.03099
                m_i is 0 with probability `drop`, else 1
    slerp     along the arc from theta_1 to theta_2           Shoemake 1985
    restore   theta_1, but theta_0 in the share of its entries that changed most
                                                              arXiv 2509.16596

Weights w_i are 1 unless given. Differences:
  * TIES trims over the whole model, here each tensor is trimmed by itself, as mergekit does it. The
    authors' code gives an entry whose sum is exactly 0 the sign that most entries have; here, as in
    the paper's formula, it has none and stays as in the base.
  * restore: the paper was read in summaries only; that it goes by |tau|, not by |tau / theta_0|,
    is UNVERIFIED. The share is taken of each tensor.
  * slerp: the angle is that of two whole tensors. Where its cosine is over 0.9995, as between most
    models with one base, or below -0.9995, the straight line is taken, as in mergekit.

Arithmetic is in float32 (float64 for float64 tensors). Models that are equal stay as they are, to
the bit, in average, linear and slerp; one that equals the base adds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tandem.engine.core.errors import ConfigError

STRAIGHT = 0.9995  # |cosine| from which on slerp is a straight line


class Merge(Protocol):
    """One kind of merge with its settings."""

    def check(self, models: int, base: bool) -> None:
        """Raises ConfigError if it cannot merge so many models, or lacks its base."""
        ...

    def tensor(self, name: str, base: Tensor | None, models: Sequence[Tensor]) -> Tensor:
        """The merged tensor. The inputs are float32 or float64, of one shape, and stay as they
        are.
        """
        ...


@dataclass(frozen=True)
class Linear:
    """The weighted mean; without weights the plain one."""

    weights: tuple[float, ...] = ()

    def check(self, models: int, base: bool) -> None:
        check_weights(self.weights, models)
        weights = weights_of(self.weights, models)
        if sum(weights) == 0:
            raise ConfigError(f"the weights {list(self.weights)} sum to 0, expected another sum")

    def tensor(self, name, base, models):
        weights = weights_of(self.weights, len(models))
        whole = sum(weights)
        shares = [weight / whole for weight in weights]
        # as differences to the first, so that equal models give that model exactly
        first, *others = models
        deltas = (model - first for model in others)
        total = weighted_sum(deltas, shares[1:], first)
        return first + total


@dataclass(frozen=True)
class TaskVector:
    weights: tuple[float, ...] = ()
    scale: float = 1.0

    def check(self, models: int, base: bool) -> None:
        check_base("task", base)
        check_weights(self.weights, models)

    def tensor(self, name, base, models):
        weights = weights_of(self.weights, len(models))
        deltas = (model - base for model in models)
        total = weighted_sum(deltas, weights, base)
        total.mul_(self.scale)
        return base + total


@dataclass(frozen=True)
class Ties:
    weights: tuple[float, ...] = ()
    scale: float = 1.0
    density: float = 0.2

    def check(self, models: int, base: bool) -> None:
        check_base("ties", base)
        check_weights(self.weights, models)
        check_share("density", self.density)
        if min(self.weights, default=1.0) <= 0:
            raise ConfigError(f"the weights are {list(self.weights)}, ties needs positive ones")

    def tensor(self, name, base, models):
        weights = weights_of(self.weights, len(models))
        deltas = []
        for model in models:
            delta = model - base
            delta.mul_(largest(delta, self.density))
            deltas.append(delta)
        sign = weighted_sum(deltas, weights, base).sign_()
        has_sign = sign != 0
        total = torch.zeros_like(base)
        total_weight = torch.zeros_like(base)
        for delta, weight in zip(deltas, weights, strict=True):
            same_sign = delta.sign() == sign
            agrees = same_sign & has_sign
            total.add_(delta * agrees, alpha=weight)
            total_weight.add_(agrees, alpha=weight)
        nobody_agrees = total_weight == 0
        total_weight.masked_fill_(nobody_agrees, 1.0)
        total.div_(total_weight)
        total.mul_(self.scale)
        return base + total


@dataclass(frozen=True)
class Dare:
    """Each model's mask depends on `seed`, its place in the list and the tensor's name alone."""

    weights: tuple[float, ...] = ()
    scale: float = 1.0
    drop: float = 0.9
    seed: int = 0

    def check(self, models: int, base: bool) -> None:
        check_base("dare", base)
        check_weights(self.weights, models)
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop is {self.drop}, expected 0 or more and less than 1")

    def tensor(self, name, base, models):
        weights = weights_of(self.weights, len(models))
        deltas = self.thinned(name, base, models)
        total = weighted_sum(deltas, weights, base)
        keep = 1 - self.drop
        total.mul_(self.scale / keep)
        return base + total

    def thinned(self, name: str, base: Tensor, models: Sequence[Tensor]):
        """The deltas, one at a time, 0 where they are dropped."""
        for place, model in enumerate(models):
            delta = model - base
            kept = self.kept(name, place, base.shape)
            delta.mul_(kept)
            yield delta

    def kept(self, name: str, place: int, shape: torch.Size) -> Tensor:
        """bool, True where the delta stays."""
        key = f"{self.seed} {place} {name}"
        digest = hashlib.sha256(key.encode()).digest()
        seed = int.from_bytes(digest[:8]) >> 1
        generator = torch.Generator()
        generator.manual_seed(seed)
        draws = torch.rand(shape, generator=generator)
        return draws >= self.drop


@dataclass(frozen=True)
class Slerp:
    """t = 0 is the first model, t = 1 the second."""

    t: float = 0.5

    def check(self, models: int, base: bool) -> None:
        check_share("t", self.t)
        if models != 2:
            raise ConfigError(f"slerp takes two models, found {models}")

    def tensor(self, name, base, models):
        first, second = models
        cosine = cosine_between(first, second)
        if abs(cosine) > STRAIGHT:
            return first.lerp(second, self.t)
        angle = torch.tensor(cosine, dtype=torch.float64)
        angle.acos_()
        to_second = (1 - self.t) * angle
        from_first = self.t * angle
        weight_first = to_second.sin() / angle.sin()
        weight_second = from_first.sin() / angle.sin()
        of_first = first * float(weight_first)
        of_second = second * float(weight_second)
        return of_first + of_second


@dataclass(frozen=True)
class Restore:
    """share = 0 is the model, share = 1 the base."""

    share: float

    def check(self, models: int, base: bool) -> None:
        check_base("restore", base)
        check_share("share", self.share)
        if models != 1:
            raise ConfigError(f"restore takes one model, found {models}")

    def tensor(self, name, base, models):
        (model,) = models
        changed_most = largest(model - base, self.share)
        return torch.where(changed_most, base, model)


def weights_of(weights: Sequence[float], models: int) -> list[float]:
    return list(weights) or [1.0] * models


def weighted_sum(deltas: Iterable[Tensor], weights: Sequence[float], like: Tensor) -> Tensor:
    """sum w_i delta_i, a fresh tensor; zero without deltas. One delta is needed at a time."""
    total = torch.zeros_like(like)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total


def cosine_between(first: Tensor, second: Tensor) -> float:
    """Of two whole tensors, in float64; 1 if one of them is 0."""
    a = first.flatten().double()
    b = second.flatten().double()
    norms = a.norm() * b.norm()
    if norms == 0:
        return 1.0
    return float((a @ b) / norms)


def largest(delta: Tensor, share: float) -> Tensor:
    """bool, True at round(share * entries) entries, those that are largest by magnitude; of equal
    ones the first.
    """
    sizes = delta.abs().flatten()
    count = round(share * len(sizes))
    if count == 0:
        return torch.zeros_like(delta, dtype=torch.bool)
    rank = len(sizes) - count + 1
    limit = sizes.kthvalue(rank).values
    chosen = sizes > limit
    missing = count - int(chosen.sum())
    at_limit = sizes == limit
    places = at_limit.nonzero().flatten()
    chosen[places[:missing]] = True
    return chosen.view_as(delta)


def check_base(kind: str, base: bool) -> None:
    if not base:
        raise ConfigError(f"{kind} works on differences to a base: give it with --base")


def check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}, expected a number from 0 to 1")


def check_weights(weights: Sequence[float], models: int) -> None:
    if weights and len(weights) != models:
        raise ConfigError(f"there are {models} models and {len(weights)} weights {list(weights)}")
