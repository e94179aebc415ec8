"""Objectives that hold the policy's distribution: entropy bonus, KL to the reference policy."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.algorithms.parts.objectives.tokens import Tokens


@dataclass(frozen=True)
class EntropyBonus:
    """-h_t, differentiable in the full distribution: a positive coefficient rewards entropy."""

    def __call__(self, tokens: Tokens):
        return -tokens["entropy"], {}


@dataclass(frozen=True)
class KLToReference:
    """k3 estimator exp(d) - d - 1 with d = log pi_ref - log pi, d clamped to +-10.

    GRPO eq. 4 (arXiv 2402.03300).
    """

    def __call__(self, tokens: Tokens):
        d = (tokens["ref_logp"] - tokens.logp).clamp(-10.0, 10.0)
        k3 = d.exp() - d - 1.0
        return k3, {"kl": k3.detach()}
