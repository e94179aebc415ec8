"""Embeddings of whole responses, and an objective that draws them together (CARFT). In names of
tensors: N trained tokens in R rows, A of which are demonstrations, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Tokens, segment_softmax, segment_sum
from tandem.engine.core.types import Source
from tandem.engine.model.policy import Policy
from tandem.engine.model.view import View


class PairedForward:
    """The ordinary forward, and each token's `similarity`: of its row's embedding to that of its
    group's demonstration, 0 where there is none.
    """

    def __call__(self, policy: Policy, view: View):
        hidden = policy.trunk(view.tokens, view.positions)[view.index]
        assert policy.critic is not None
        value, u = policy.critic(hidden, embed=True)
        near = similarity(value, u, view.segment, view.group, view.source)
        return policy.read(hidden, view) | {"value": value, "similarity": near}


def similarity(
    value_N: Tensor,
    u_ND: Tensor,
    segment_N: Tensor,
    group_N: Tensor,
    source_N: Tensor,
) -> Tensor:
    """[N]: of each token's row. The demonstration's side carries no gradient."""
    z_RD = segment_sum(u_ND * segment_softmax(value_N, segment_N)[:, None], segment_N)
    first_R = torch.searchsorted(segment_N, torch.arange(len(z_RD), device=segment_N.device))
    group_R = group_N[first_R]
    anchor_A = (source_N[first_R] == int(Source.EXPERT)).nonzero().squeeze(-1)
    if not len(anchor_A):
        return 0.0 * (value_N + u_ND.sum(1))  # attached to both, as on a rank that has some
    paired_RA = (group_R[:, None] == group_R[anchor_A]) & (group_R >= 0)[:, None]
    own_R = anchor_A[paired_RA.int().argmax(1)]
    cosine_R = torch.cosine_similarity(z_RD, z_RD[own_R].detach(), dim=1)
    return (cosine_R * paired_RA.any(1))[segment_N]


@dataclass(frozen=True)
class Attraction:
    """-min(s, cap)/tau: nothing is left to gain beyond the cap."""

    tau: float = 0.2
    cap: float = 0.9

    def __call__(self, tokens: Tokens):
        s = tokens["similarity"]
        return -s.clamp(max=self.cap) / self.tau, {"similarity": s.detach()}
