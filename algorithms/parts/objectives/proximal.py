"""Proximal SFT's objective: demonstrations trained as PPO trains samples of advantage 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tandem.algorithms.parts.objectives.bounds import check_clip_range
from tandem.algorithms.parts.objectives.policy import ratio_metrics
from tandem.algorithms.parts.objectives.tokens import Tokens, clamped_exp


@dataclass(frozen=True)
class ClippedRatio:
    """-min(r, clip(r, 1 - clip_low, 1 + clip_high)) with r = pi/pi_old, pi_old from before the
    first update of the batch. Only the upper clip acts. In a step of one update r is 1, and the
    gradient that of -log p.

    Source: arXiv 2508.17784 and the authors' code; see algorithms/sft/psft.py.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28

    def __post_init__(self):
        check_clip_range("proximal", self.clip_low, self.clip_high)

    def __call__(self, tokens: Tokens):
        ratio = clamped_exp(tokens.logp - tokens.old)
        low, high = 1.0 - self.clip_low, 1.0 + self.clip_high
        loss = -torch.minimum(ratio, ratio.clamp(low, high))
        return loss, ratio_metrics(tokens, ratio > high)
