"""RL with an SFT loss: the sum of both, advantages from rollouts alone.

    L = L_GRPO + c L_SFT

Source: a baseline of LUFFY (arXiv 2504.14945, table 1: 40.1 against 45.5 for RL alone) with c = 1.
There the SFT term is a token mean while the policy term is a sum over tokens divided by 8192, which
hides a ratio that grows with the batch; here both are token means unless `policy` says otherwise:
theirs is `policy: {preset: luffy_code, reduction_length: 8192}`. Their SFT mean is per micro-batch,
added up and averaged over GPUs, so that the ratio also grows with both (and their entropy bonus
covers demonstrations, here rollouts only): `code_gpus` and `code_micro_batches` of `policy` stand
for the machine (algorithms/parts/policy.py), 1 and 1 unless given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch
from tandem.algorithms.parts.demos import DemoLoss
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rl_method import RLMethod


@dataclass
class RLWithSFT(RLMethod):
    title: ClassVar[str] = "GRPO + c SFT"
    paper: ClassVar[str] = "2504.14945"
    uses_experts: ClassVar[bool] = True

    coefficient: Schedule = Schedule(peak=1.0)
    demos: DemoLoss = DemoLoss()

    def rows(self, batch: Batch):
        return self.policy.rows(batch.groups) + [self.demos.row(t, "expert") for t in batch.experts]

    def terms(self, batch: Batch):
        coefficient = self.policy.mean_weight * self.coefficient(batch.step, batch.signals)
        return [*self.policy.terms(batch), *self.demos.terms("expert", batch, coefficient)]
