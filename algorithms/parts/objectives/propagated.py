"""Tokens that pay for the errors that follow them: the objective of IFT, arXiv 2405.11870."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Tokens

REPORTED = ("gold_logp", "guessed")  # by the method's own forward


@dataclass(frozen=True)
class PropagatedNLL:
    """w_t ell_t; the rows' tokens stand together. gamma None: the paper's double sum."""

    gamma: float | None = 0.95
    detach: bool = False

    def __call__(self, tokens: Tokens):
        ell = -tokens.logp
        if self.gamma != 0.0:
            _, counts = torch.unique_consecutive(tokens.segment, return_counts=True)
            weighted = []
            for row in torch.split(ell, counts.tolist()):
                weighted.append(self.weight(row) * row)
            ell = torch.cat(weighted)
        return ell, {name: tokens[name] for name in REPORTED if name in tokens}

    def weight(self, row: Tensor) -> Tensor:
        """w [T] from ell [T] of one row."""
        place = torch.arange(len(row), device=row.device)
        if self.gamma is None:
            return place + 1.0
        ahead = place[None, :] - place[:, None]
        powers = self.gamma ** ahead.clamp(min=0).float()
        discount = torch.where(ahead >= 0, powers, 0.0)
        weight = discount @ row
        total = weight.sum().clamp(min=1e-12)
        weight = weight * len(row) / total
        if self.detach:
            weight = weight.detach()
        return weight
