"""Correction of the gap between the rollout engine's policy and the learner's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Tokens, clamped_exp, segment_sum


@dataclass(frozen=True)
class RolloutCorrection:
    """Truncated importance sampling between learner snapshot and rollout engine:
    w = exp(log pi_old - log pi_rollout), no gradient.

    It multiplies the loss outside the clip, on tokens that a rollout engine sampled; all others
    keep weight 1.
    level     token: w_t;  sequence: the product of w_t over the row's sampled tokens
    mode      truncate: min(w, cap) (TIS, default cap 2 as in verl)
              mask: w where floor <= w <= cap, else 0; floor None is 1/cap. IcePop: 0.5 and 5
    """

    level: str = "token"
    mode: str = "truncate"
    cap: float = 2.0
    floor: float | None = None

    def __call__(self, tokens: Tokens) -> Tensor:
        behaviour_logp = tokens["behaviour_logp"]
        sampled = ~torch.isnan(behaviour_logp)
        log_w = torch.nan_to_num(tokens.old.detach() - behaviour_logp, nan=0.0)
        if self.level == "sequence":
            log_w = segment_sum(log_w, tokens.segment)[tokens.segment]
        w = clamped_exp(log_w)
        if self.mode == "truncate":
            w = w.clamp(max=self.cap)
        else:
            floor = 1.0 / self.cap if self.floor is None else self.floor
            w = torch.where((w >= floor) & (w <= self.cap), w, torch.zeros_like(w))
        return torch.where(sampled, w, torch.ones_like(w))


def token_correction(off_policy: bool) -> RolloutCorrection | None:
    """Token TIS of a term on own samples, where these may be older than the learner."""
    return RolloutCorrection() if off_policy else None
