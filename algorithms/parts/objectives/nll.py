"""Objectives on demonstrations: negative log-likelihood and its weighted forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Objective, Tokens, segment_mean
from tandem.engine.core.text import closest
from tandem.engine.core.types import Source

WEIGHTS = ("one", "p", "phi")


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood times a detached function of p = exp(logp).

    weight  w(p)         source
    one     1            SFT
    p       p            SFT-IS, CHORD's rejected variant (arXiv 2508.11408), also DFT
                         (arXiv 2508.05629)
    phi     p (1 - p)    CHORD-phi, arXiv 2508.11408 sec. 4.2

    The weight carries no gradient: the paper's formula is silent, both public codes detach.
    """

    weight: str = "one"

    def __post_init__(self):
        if self.weight not in WEIGHTS:
            hint = closest(self.weight, WEIGHTS)
            known = ", ".join(WEIGHTS)
            raise ValueError(f"objective nll: weight is {self.weight!r}{hint}; known: {known}")

    def __call__(self, tokens: Tokens):
        p = tokens.logp.detach().exp()
        weight = token_weight(p, self.weight)
        return -weight * tokens.logp, {"p": p}


@dataclass(frozen=True)
class Weighted:
    """`objective` times the detached function of p that NLL calls `weight`: CHORD's token weights
    on another objective than NLL.
    """

    objective: Objective
    weight: str

    def __call__(self, tokens: Tokens):
        loss, metrics = self.objective(tokens)
        p = tokens.logp.detach().exp()
        weight = token_weight(p, self.weight)
        return weight * loss, {"p": p, **metrics}


def token_weight(p: Tensor, weight: str) -> Tensor:
    if weight == "p":
        return p
    if weight == "phi":
        return p * (1.0 - p)
    return torch.ones_like(p)


@dataclass(frozen=True)
class ExpertRatio:
    """-A f(p) on expert tokens whose behaviour probability is taken as 1, so that the ratio is p
    itself; no clip. The gradient goes through f.

    f(p) = p/(p + gamma)    LUFFY's shaping, arXiv 2504.14945 eq. 8: weight A gamma p/(p + gamma)^2
                            on grad log pi, largest at p = gamma
    f(p) = p                gamma None: plain importance sampling, weight A p
    """

    gamma: float | None = 0.1

    def __call__(self, tokens: Tokens):
        p = tokens.logp.exp()
        shaped = p
        if self.gamma is not None:
            shaped = p / (p + self.gamma)
        return -tokens["advantage"] * shaped, {"p": p.detach()}


@dataclass(frozen=True)
class BySource:
    """One term, one denominator, two objectives: `expert` on expert tokens, `rollout` on all
    others. Metrics of either are named by it: expert/p.
    """

    rollout: Objective
    expert: Objective

    def __call__(self, tokens: Tokens):
        is_expert = tokens.source == int(Source.EXPERT)
        parts = {"rollout": (self.rollout, ~is_expert), "expert": (self.expert, is_expert)}
        loss = torch.zeros_like(tokens.logp)
        metrics = {}
        for name, (objective, chosen) in parts.items():
            index = chosen.nonzero().squeeze(-1)
            if len(index):
                part, metrics[name] = objective(tokens.take(index))
                loss = loss.index_add(0, index, part)
                metrics[f"{name}_share"] = chosen.float()
        return loss, metrics


@dataclass(frozen=True)
class EntropyWeightedNLL:
    """-sg[scale exp(sign H)] log p, H the mean token entropy of the row (level `sequence`) or the
    token's own (`token`). SRFT, arXiv 2506.19767 eq. 7.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    scale: float = 0.5
    sign: float = -1.0
    level: str = "sequence"

    def __post_init__(self):
        if self.level not in ("sequence", "token"):
            raise ValueError(
                f"objective entropy_nll: level is {self.level!r}; known: sequence, token"
            )

    def __call__(self, tokens: Tokens):
        weight = entropy_weight(tokens, self.scale, self.sign, self.level)
        return -weight * tokens.logp, {"weight": weight}


@dataclass(frozen=True)
class SelfReinforce:
    """-sg[scale exp(H)] log p on samples with A > 0, +log p on the others: no baseline, no clip.

    SRFT, arXiv 2506.19767 eq. 10.
    """

    scale: float = 0.1
    level: str = "sequence"

    def __call__(self, tokens: Tokens):
        weight = entropy_weight(tokens, self.scale, 1.0, self.level)
        right = tokens["advantage"] > 0
        ones = torch.ones_like(weight)
        factor = torch.where(right, -weight, ones)
        loss = factor * tokens.logp
        return loss, {"weight": weight, "right": right.float()}


def entropy_weight(tokens: Tokens, scale: float, sign: float, level: str) -> Tensor:
    h = tokens["entropy"].detach()
    if level == "sequence":
        h = segment_mean(h, tokens.segment)
    return scale * torch.exp(sign * h)


@dataclass(frozen=True)
class PrefixSelected:
    """`objective`, but of each row's PREFIX tokens only the share `keep` with the highest entropy
    is pushed; the others count, with advantage 0.

    Prefix-RFT, arXiv 2507.01679: entropy-based clipping. ceil(keep * tokens) per row, so that the
    choice does not depend on the micro-batch.
    """

    objective: Objective
    keep: float = 0.2

    def __call__(self, tokens: Tokens):
        prefix = tokens.source == int(Source.PREFIX)
        advantage = tokens["advantage"]
        index = prefix.nonzero().squeeze(-1)
        if len(index):
            dropped = self.dropped(tokens, index)
            advantage = advantage.index_fill(0, dropped, 0.0)
        loss, metrics = self.objective(tokens.with_streams(advantage=advantage))
        return loss, {**metrics, "prefix_share": prefix.float()}

    def dropped(self, tokens: Tokens, index: Tensor) -> Tensor:
        """int64 [k]: those of the prefix tokens `index` that are not pushed."""
        # by row, within a row by falling entropy
        entropy = tokens["entropy"][index]
        by_entropy = torch.argsort(entropy, descending=True, stable=True)
        order = index[by_entropy]
        by_row = torch.argsort(tokens.segment[order], stable=True)
        order = order[by_row]
        row = tokens.segment[order]
        count = torch.bincount(row)
        start = torch.cumsum(count, 0) - count
        place = torch.arange(len(order), device=order.device)
        rank = place - start[row]
        # 1e-6: 0.2 * 5 is a little more than 1 in binary
        kept = torch.ceil(self.keep * count - 1e-6)
        return order[rank >= kept[row]]
