"""GRPO: group-relative policy optimisation on the model's own samples, and with `policy:` options
the whole family around it.

    L   = RED_roll{ max( -rho_t A_i, -clip(rho_t, 1 - eps_l, 1 + eps_h) A_i ) }
          + beta RED_roll{ k3(pi || pi_ref) }
    A_i = (R_i - mean_group) / (std_group + 1e-6)

Source: arXiv 2402.03300 (eq. 3, 4). Defaults: eps 0.2 (PPO); beta 0 and RED = token_mean, the
present practice (DAPO, arXiv 2503.14476), where the paper has beta 0.04 and a mean of sequence
means (`reduction: seq_mean_token_mean`). With one update per batch of rollouts rho is 1 and the
clip inert. Rollouts that may be older than the learner are corrected by truncated importance
sampling (`correction: auto`). Dr.GRPO, DAPO, RLOO, REINFORCE++, GSPO and CISPO are presets of the
same options: see algorithms/parts/policy.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.base import Batch
from tandem.algorithms.rl_method import RLMethod


@dataclass
class GRPO(RLMethod):
    title: ClassVar[str] = "group-relative policy optimisation on own samples"
    paper: ClassVar[str] = "2402.03300"

    def rows(self, batch: Batch):
        return self.policy.rows(batch.groups)

    def terms(self, batch: Batch):
        return self.policy.terms(batch)
