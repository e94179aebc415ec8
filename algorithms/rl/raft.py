"""RAFT: SFT on the model's own right samples, the baseline that needs no advantage.

    L = SUM_{samples with R >= correct} -log p_t  /  Z
    per accepted    Z counts the tokens of the right samples: SFT on what was filtered
    per all         Z counts the tokens of all samples: REINFORCE with A = 1[R >= correct]

Source: rejection-sampling fine-tuning; section 7 of the dossier on distillation and hints. The two
differ by the step's acceptance rate, which is a learning-rate schedule in disguise: it falls as the
model gets better. RAFT++ (a ratio and a clip on top): UNVERIFIED, not here; grpo with `advantage:
raw` is near it.

Samples that may be older than the learner (`rollout.staleness`, a replay) are corrected by
truncated importance sampling, as those of grpo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tandem.algorithms.base import Batch, Method, Term
from tandem.algorithms.parts.objectives.correction import token_correction
from tandem.algorithms.parts.objectives.policy import Reinforce
from tandem.algorithms.rows import policy_row

TERM = "own"


@dataclass
class RAFT(Method):
    title: ClassVar[str] = "SFT on the model's own right samples: rejection sampling"
    needs_groups: ClassVar[bool] = False

    correct: float = 1.0  # a sample with at least this reward is right
    per: Literal["accepted", "all"] = "accepted"

    def rows(self, batch: Batch):
        rows = []
        for group in batch.groups:
            for trajectory, reward in zip(group.trajectories, group.rewards, strict=True):
                right = float(reward >= self.correct)
                row = policy_row(trajectory, right, TERM)
                if self.per == "accepted":
                    row = row.with_term(TERM, row.weights[TERM] * np.float32(right))
                rows.append(row)
        return rows

    def terms(self, batch: Batch):
        correction = token_correction(batch.off_policy)
        return [Term(TERM, Reinforce(), correction=correction)]
