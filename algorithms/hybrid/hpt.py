"""HPT: per prompt, RL where the model succeeds often enough, SFT on the demonstration where it does
not.

    L     = mean_q L(q),    L(q) = L_RL(q) if P(q) > gate else L_SFT(q)
    P(q)  = share of right rollouts
    L_RL  = -(1/n) sum_i sum_t CLIP(rho, A_i),    A = (R - mean)/std
    L_SFT = -(1/|y*|) sum_t log p_t

Source: arXiv 2509.04419. gate 0 (SFT only where all rollouts fail) for Qwen, 2/8 for Llama. A
prompt without a demonstration keeps its rollouts. The mean over prompts is this file's reading of
the paper, which writes the loss of one prompt: each half weighs as much as its share of the
prompts. Paper and code: as=code has no std, no clip, the policy sum divided by the response limit
(give it as `policy: {reduction_length: 8192}`), SFT as a token mean that weighs 1 whatever its
share, and an entropy bonus of 0.001 on the mean entropy, of demonstrations as well. The code takes
its means per micro-batch, adds them up, and averages over GPUs, so that on G GPUs with K
micro-batches SFT weighs G K times as much against RL as on one GPU with one. Here there is one
global mean; `policy: {code_gpus: G, code_micro_batches: K}` gives that ratio
(algorithms/parts/policy.py). The published script has G = 8, and bins of 32,768 tokens for 64 rows
a GPU: K is about 4 at 2,000 tokens a row. Both are 1 unless given, as on one GPU. The code also
skips steps whose gradient norm is above 80; learner.max_skipped_steps knows non-finite ones only.
The gate looks at the step's own rollouts and keeps nothing. With dynamic sampling, prompts that go
to SFT are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.parts.variants import select, variant_option
from tandem.algorithms.rl_method import RLMethod
from tandem.algorithms.rows import demonstration
from tandem.engine.core.types import Row, ScoredGroup


@dataclass
class HPT(RLMethod):
    title: ClassVar[str] = "per prompt: RL if solved often enough, else SFT on its demonstration"
    paper: ClassVar[str] = "2509.04419"
    uses_experts: ClassVar[bool] = True
    prompts_from_experts: ClassVar[bool] = True
    demos_term: ClassVar[str] = "sft"

    variant: str = variant_option()  # paper | code
    # share of right rollouts up to which a prompt goes to SFT; below 0: never
    gate: float = 0.0
    sft_coefficient: Schedule = Schedule(peak=1.0)  # the authors use 0.3 for Qwen2.5-Math-1.5B
    demos: DemoLoss = DemoLoss()

    def __post_init__(self):
        super().__post_init__()
        self.reported_share = 0.0

    def policy_defaults(self):
        paper = {"reduction": "seq_mean_token_sum"}
        return select(self.variant, paper, code={"preset": "luffy_code"})

    @property
    def needs_groups(self) -> bool:
        """With one rollout per prompt its reward still decides on learning the demonstration."""
        return self.gate < 0

    def gated(self, group: ScoredGroup) -> bool:
        """Integer counts, so that a gate of k/n holds exactly k right answers."""
        if group.prompt.demonstration is None:
            return False
        right = int((group.rewards > 0).sum())
        share = self.gate * len(group.rewards)
        most = math.floor(share + 1e-9)
        return right <= most

    def sft_share(self, batch: Batch) -> float:
        """Of the step's prompts."""
        to_sft = sum(map(self.gated, batch.groups))
        prompts = max(1, len(batch.groups))
        return to_sft / prompts

    def accept(self, group):
        return self.gated(group) or self.policy.accept(group)

    def rows(self, batch: Batch) -> list[Row]:
        self.reported_share = self.sft_share(batch)
        has_bonus = self.variant == "code" and "entropy" in self.policy.regularisers()
        rl = []
        sft = []
        for group in batch.groups:
            if not self.gated(group):
                rl.append(group)
                continue
            row = self.demos.row(demonstration(group), "sft")
            if has_bonus:
                row = row.with_term("entropy", row.weights["sft"].copy())
            sft.append(row)
        return self.policy.rows(rl) + sft

    def terms(self, batch: Batch) -> list[Term]:
        if self.variant == "paper":
            sft = self.sft_share(batch)
            rl = 1.0 - sft
            reduction = Reduction("seq_mean_token_mean")
        else:
            sft = self.policy.mean_weight
            rl = 1.0
            reduction = Reduction("token_mean")
        coefficient = sft * self.sft_coefficient(batch.step, batch.signals)
        sft_terms = self.demos.terms("sft", batch, coefficient, reduction)
        return [*self.policy.terms(batch, rl), *sft_terms]

    def metrics(self, step):
        return {"sft_share": self.reported_share}
