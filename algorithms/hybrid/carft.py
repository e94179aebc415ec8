"""CARFT: ReFT's PPO, and an attraction of right answers' embeddings to that of the annotated
solution of the same question. Experimental.

    u_t = W hidden_t,   V_t = w . relu(u_t) + b,    z(y) = sum_t softmax_t(V_t) u_t          the
                        value head also embeds, and its values pool
    s_i = cos( sg[z(y*_i)], z(y_i) ),               L = L_PPO + 5 L_V + contrast * sum_i c_i (
                                                    -min(s_i, 0.9)/tau ) / sum_i c_i,    c_i = 1[R_i
                                                    >= correct]

Source: arXiv 2508.15868 and the authors' code (trainer v4). Defaults: tau 0.2, contrast 0.1, 64
dimensions, KL in the reward 0.05, lam 0.95, one sample per question. Paper and code: the published
loss is InfoNCE over all ranks. In the code the gathered embeddings carry no gradient, so the
denominator pushes nothing and what is left is this attraction, which stops at s = 0.9; this file is
that. `as: paper` is the mean over the right samples, as published. In the code the correctness mask
is broadcast to a matrix, so that every loss is counted with every correctness: a micro-batch with
one right sample adds up the attraction of all its samples, right or wrong. `as: code` is that on
the samples of a step: a sum per micro-batch of `micro_batch` samples (4 a GPU as published),
averaged over micro-batches and GPUs, so `micro_batch` times the mean over all samples of the step,
if any is right. The head is the code's (ReLU between its two layers; no bias in the first, and here
V starts at 0), for both. z(y*) is embedded with the weights of the step; in the code with those
from before the batch. UNVERIFIED: the "embedding-enhanced partial reward" and the loss on negatives
of the paper (another trainer, v8) are left out. Start from the SFT checkpoint that ReFT would make:
it is also the reference. Demonstrations come with their questions. With contrast 0 it is ReFT's
second stage. Uses the custom-forward hook (see `Method.forward`), and keeps a question's rows in
one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.policy import PolicyLoss, variant
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.rows import demonstration, expert_row
from tandem.engine.core.types import Row, Source


class PairedForward:
    """The ordinary forward, and as `extra` each token's `similarity`: of its row's embedding to
    that of its group's demonstration, 0 where there is none.
    """

    def __call__(self, policy, tokens, positions, index, target, temperature, chunk, entropy, tags):
        hidden = policy.trunk(tokens, positions)[index]
        value, u = policy.critic(hidden, embed=True)
        return (
            *policy.head(hidden, target, temperature, chunk, entropy),
            value,
            {"similarity": similarity(value, u, **tags)},
        )


def similarity(
    value: torch.Tensor,
    u: torch.Tensor,
    segment: torch.Tensor,
    group: torch.Tensor,
    source: torch.Tensor,
) -> torch.Tensor:
    """[n] from the values [n] and embeddings [n, d] of a micro-batch's tokens.

    The demonstration's side carries no gradient.
    """
    rows = int(segment.max()) + 1 if len(segment) else 0
    top = torch.full((rows,), -torch.inf, device=value.device).scatter_reduce(
        0, segment, value.detach(), "amax"
    )
    share = (value - top[segment]).exp()
    total = torch.zeros(rows, device=value.device).index_add(0, segment, share)
    z = torch.zeros(rows, u.shape[1], device=u.device).index_add(
        0, segment, u * (share / total[segment])[:, None]
    )
    first = torch.searchsorted(segment, torch.arange(rows, device=segment.device))
    groups, anchors = group[first], (source[first] == int(Source.EXPERT)).nonzero().squeeze(-1)
    pair = (groups[:, None] == groups[None, anchors]) & (groups >= 0)[:, None]
    if not len(anchors):
        return 0.0 * (value + u.sum(1))  # attached to both, as on a rank that has some
    cosine = torch.cosine_similarity(z, z[anchors[pair.int().argmax(1)]].detach(), dim=1)
    return (cosine * pair.any(1))[segment]


@dataclass(frozen=True)
class Attraction:
    """-min(s, cap)/tau: nothing is left to gain beyond the cap."""

    tau: float = 0.2
    cap: float = 0.9

    def __call__(self, tokens: Tokens):
        s = tokens.extra["similarity"]
        return -s.clamp(max=self.cap) / self.tau, {"similarity": s.detach()}


@dataclass
class CARFT(Method):
    title: ClassVar[str] = (
        "PPO with a critic that also draws right answers towards the annotated solution "
        "(experimental)"
    )
    paper: ClassVar[str] = "2508.15868"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    embedding: ClassVar[int] = 64

    as_: str = "paper"  # paper | code
    contrast: float = 0.1
    tau: float = 0.2
    cap: float = 0.9
    micro_batch: int = 4  # as code: samples of one of the authors' micro-batches
    correct: float = 1.0  # a sample with at least this reward is right
    policy: PolicyLoss | dict | str = field(default_factory=dict)

    def __post_init__(self):
        variant(self.as_, None, None)
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, must be at least 1")
        self.policy = PolicyLoss.parse(
            self.policy,
            preset="ppo",
            reduction="seq_mean_token_mean",
            critic={"lam": 0.95, "kl": 0.05, "coefficient": 5.0},
        )
        if not self.critic:
            raise ValueError(
                f"method.policy.advantage is {self.policy.advantage!r}: CARFT pools "
                "embeddings by the critic's values; leave it at gae (preset ppo)"
            )

    @property
    def forward(self):
        return PairedForward() if self.contrast else None

    def rows(self, batch: Batch):
        rows = self.policy.rows(batch.groups)
        if not self.contrast:
            return rows
        paired = {g.group for g in batch.groups if g.prompt.demonstration is not None}
        right = [r >= self.correct for g in batch.groups for r in g.rewards]
        attracted = [ok and row.group in paired for row, ok in zip(rows, right, strict=True)]
        if self.as_ == "code" and any(attracted):
            attracted = [row.group in paired for row in rows]
        rows = [with_contrast(row) if ok else row for row, ok in zip(rows, attracted, strict=True)]
        drawn = {row.group for row in rows if "contrast" in row.weights}
        return rows + [
            replace(expert_row(demonstration(g), "anchor"), group=g.group)
            for g in batch.groups
            if g.group in drawn
        ]

    def terms(self, batch: Batch):
        if not self.contrast:
            return self.policy.terms(batch)
        coefficient = variant(self.as_, self.contrast, self.contrast * self.micro_batch)
        contrast = Term(
            "contrast",
            Attraction(self.tau, self.cap),
            Reduction("seq_mean_token_sum"),
            coefficient,
            needs=frozenset({"similarity"}),
            together=True,
        )
        return [*self.policy.terms(batch), contrast, Term("anchor", NLL(), coefficient=0.0)]


def with_contrast(row: Row) -> Row:
    """The row as one sample of the contrast."""
    return row.with_term("contrast", last(row))


def last(row: Row) -> np.ndarray:
    """float32 [T]: 1 on the row's last policy token, so that the row counts once."""
    weight = np.zeros(len(row.tokens), np.float32)
    weight[np.flatnonzero(row.weights["policy"])[-1:]] = 1
    return weight
