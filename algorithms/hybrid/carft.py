"""CARFT: ReFT's PPO, and an attraction of right answers' embeddings to that of the annotated
solution of the same question. Experimental.

    u_t  = W hidden_t,  V_t = w . relu(u_t) + b        the value head also embeds
    z(y) = sum_t softmax_t(V_t) u_t                    and its values pool
    s_i  = cos( sg[z(y*_i)], z(y_i) ),    c_i = 1[R_i >= correct]
    L    = L_PPO + 5 L_V + contrast * sum_i c_i ( -min(s_i, 0.9)/tau ) / sum_i c_i

Source: arXiv 2508.15868 and the authors' code (trainer v4). Defaults: tau 0.2, contrast 0.1, 64
dimensions, KL in the reward 0.05, lam 0.95, one sample per question.

Paper and code: the published loss is InfoNCE over all ranks. In the code the gathered embeddings
carry no gradient, so the denominator pushes nothing and what is left is this attraction, which
stops at s = 0.9; this file is that.

`as: paper`: the mean over the right samples, as published.

`as: code`: in the code the correctness mask is broadcast to a matrix, so that every loss is counted
with every correctness: a micro-batch with one right sample adds up the attraction of all its
samples, right or wrong. Here that is done on the samples of a step: a sum per micro-batch of
`micro_batch` samples (4 a GPU as published), averaged over micro-batches and GPUs, so `micro_batch`
times the mean over all samples of the step, if any is right.

Head: the code's (ReLU between its two layers; no bias in the first, and here V starts at 0), for
both. z(y*) is embedded with the weights of the step; in the code with those from before the batch.

UNVERIFIED: the "embedding-enhanced partial reward" and the loss on negatives of the paper (another
trainer, v8) are left out.

Use: start from the SFT checkpoint that ReFT would make: it is also the reference. Demonstrations
come with their questions. With contrast 0 it is ReFT's second stage. It uses the custom-forward
hook (see `Method.forward`), and keeps a question's rows in one micro-batch. No `demos`: the
demonstration is only drawn to, it has no likelihood term.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.objectives.embedding import Attraction, PairedForward
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.variants import check_variant, select, variant_option
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.rows import demonstration, expert_row
from tandem.engine.core.types import Row, ScoredGroup


@dataclass
class CARFT(RLMethod):
    title: ClassVar[str] = (
        "PPO with a critic that also draws right answers towards the annotated solution "
        "(experimental)"
    )
    paper: ClassVar[str] = "2508.15868"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    embedding: ClassVar[int] = 64

    variant: str = variant_option()  # paper | code
    contrast: float = 0.1
    tau: float = 0.2
    cap: float = 0.9
    micro_batch: int = 4  # as code: samples of one of the authors' micro-batches
    correct: float = 1.0  # a sample with at least this reward is right

    def __post_init__(self):
        check_variant(self.variant)
        if self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}, must be at least 1")
        super().__post_init__()
        if not self.critic:
            raise ValueError(
                f"method.policy.advantage is {self.policy.advantage!r}: CARFT pools "
                "embeddings by the critic's values; leave it at gae (preset ppo)"
            )

    def policy_defaults(self):
        critic = {"lam": 0.95, "kl": 0.05, "coefficient": 5.0}
        return {"preset": "ppo", "reduction": "seq_mean_token_mean", "critic": critic}

    @property
    def forward(self):
        return PairedForward() if self.contrast else None

    def rows(self, batch: Batch):
        rows = self.policy.rows(batch.groups)
        if not self.contrast:
            return rows
        paired = {g.group for g in batch.groups if g.prompt.demonstration is not None}
        attracted = []  # of each row: policy.rows has one per sample, in the order of the groups
        for group in batch.groups:
            attracted += [r >= self.correct and group.group in paired for r in group.rewards]
        if self.variant == "code" and any(attracted):
            attracted = [row.group in paired for row in rows]
        rows = [with_contrast(row) if ok else row for row, ok in zip(rows, attracted, strict=True)]
        attracting = {row.group for row in rows if "contrast" in row.weights}
        return rows + [anchor(g) for g in batch.groups if g.group in attracting]

    def terms(self, batch: Batch):
        if not self.contrast:
            return self.policy.terms(batch)
        contrast = Term(
            "contrast",
            Attraction(self.tau, self.cap),
            Reduction("seq_mean_token_sum"),
            select(self.variant, self.contrast, self.contrast * self.micro_batch),
            needs=frozenset({"similarity"}),
            together=True,
        )
        # coefficient 0: only so that the demonstration is in the forward
        in_forward = Term("anchor", NLL(), coefficient=0.0)
        return [*self.policy.terms(batch), contrast, in_forward]


def with_contrast(row: Row) -> Row:
    """The row as one sample of the contrast. Its last policy token alone counts: the similarity
    is a number of the row, the same at all its tokens."""
    weight = np.zeros(len(row.tokens), np.float32)
    weight[np.flatnonzero(row.weights["policy"])[-1:]] = 1
    return row.with_term("contrast", weight)


def anchor(group: ScoredGroup) -> Row:
    """The demonstration, to which the group's right samples are drawn."""
    return replace(expert_row(demonstration(group), "anchor"), group=group.group)
