"""SFT: supervised fine-tuning on expert demonstrations.

    L = - TOK_demo{ log p_t }          the mean over all expert tokens of the global batch, not a
                                       mean of means

Source: the standard objective; on what goes wrong when the denominator is taken per micro-batch,
see the audit arXiv 2604.23747. `demos` puts another objective in the place of -log p: DFT, TALR,
iw-SFT and others of algorithms/parts/demos.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch, Method
from tandem.algorithms.parts.demos import DemoLoss


@dataclass
class SFT(Method):
    title: ClassVar[str] = "supervised fine-tuning on demonstrations"
    uses_experts: ClassVar[bool] = True
    uses_rollouts: ClassVar[bool] = False
    demos_term: ClassVar[str] = "sft"

    demos: DemoLoss = DemoLoss()

    def rows(self, batch: Batch):
        return [self.demos.row(t, "sft") for t in batch.experts]

    def terms(self, batch: Batch):
        return self.demos.terms("sft", batch)
