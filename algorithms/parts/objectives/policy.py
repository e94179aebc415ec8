"""Policy-gradient objectives on the policy's own samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Tokens, clamped_exp, segment_mean


@dataclass(frozen=True)
class PPOClip:
    """max(-A rho, -A clamp(rho, 1 - clip_low, 1 + clip_high)) with rho = pi/pi_old, PPO eq. 7
    (arXiv 1707.06347).

    dual_clip c > 1 bounds the loss of tokens with A < 0 by -A c (arXiv 1912.09729). None switches
    it off.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __call__(self, tokens: Tokens):
        rho = clamped_exp(tokens.logp - tokens.old)
        a = tokens["advantage"]
        low = 1.0 - self.clip_low
        high = 1.0 + self.clip_high
        loss = clipped_loss(a, rho, low, high)
        if self.dual_clip is not None:
            bounded = torch.minimum(-a * self.dual_clip, loss)
            loss = torch.where(a < 0, bounded, loss)
        clipped = inert(a, rho, low, high)
        return loss, ratio_metrics(tokens, clipped)


@dataclass(frozen=True)
class GSPO:
    """PPO's clip on the sequence ratio s_i = exp(mean_t (log pi - log pi_old)), GSPO arXiv
    2507.18071 eq. 5-7.

    Written per token as sg[s_i] pi/sg[pi], the paper's token form (eq. 14-15), whose gradient with
    equal advantages is that of the sequence form.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __call__(self, tokens: Tokens):
        log_ratio = (tokens.logp - tokens.old).detach()
        mean_log_ratio = segment_mean(log_ratio, tokens.segment)
        ratio = clamped_exp(mean_log_ratio)
        rho = ratio * clamped_exp(tokens.logp - tokens.logp.detach())
        a = tokens["advantage"]
        low = 1.0 - self.clip_low
        high = 1.0 + self.clip_high
        loss = clipped_loss(a, rho, low, high)
        clipped = inert(a, rho, low, high)
        return loss, ratio_metrics(tokens, clipped)


@dataclass(frozen=True)
class CISPO:
    """-sg[clamp(rho, 1 - clip_low, 1 + clip_high)] A log pi: a token outside the range keeps a
    bounded gradient. MiniMax-M1, arXiv 2506.13585 eq. 4-5.

    Clamped on both sides as in verl; TRL clamps above only (`clip_low: 1.0` is that).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __call__(self, tokens: Tokens):
        rho = clamped_exp(tokens.logp - tokens.old)
        rho = rho.detach()
        low = 1.0 - self.clip_low
        high = 1.0 + self.clip_high
        loss = -rho.clamp(low, high) * tokens["advantage"] * tokens.logp
        clipped = (rho > high) | (rho < low)
        return loss, ratio_metrics(tokens, clipped)


@dataclass(frozen=True)
class Reinforce:
    """-A log pi."""

    def __call__(self, tokens: Tokens):
        return -tokens["advantage"] * tokens.logp, {}


def clipped_loss(a: Tensor, rho: Tensor, low: float, high: float) -> Tensor:
    """max(-A rho, -A clamp(rho, low, high)) per token [n]."""
    plain = -a * rho
    clamped = -a * rho.clamp(low, high)
    return torch.maximum(plain, clamped)


def inert(a: Tensor, rho: Tensor, low: float, high: float) -> Tensor:
    """bool [n]: tokens that the clip leaves without a gradient."""
    too_likely = (a > 0) & (rho > high)
    too_unlikely = (a < 0) & (rho < low)
    return too_likely | too_unlikely


def ratio_metrics(tokens: Tokens, clipped: Tensor) -> dict[str, Tensor]:
    kl = tokens.old - tokens.logp
    return {
        "clip_fraction": clipped.float(),
        "ppo_kl": kl.detach(),
    }
