"""PPO: clipped policy gradient on own samples with a learned critic, whose value head sits on the
policy's own trunk.

    r_t     = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R
    delta_t = r_t + gamma V_{t+1} - V_t
    A_t     = sum_k (gamma lam)^k delta_{t+k},  returns = A + V;  A then whitened over the batch
    L       = RED{ max( -rho_t A_t, -clip(rho_t, 1 - eps_l, 1 + eps_h) A_t ) }
              + c RED{ 1/2 max( (V - ret)^2, (clip(V, V_old +- eps_v) - ret)^2 ) }

Source: arXiv 1707.06347, GAE 1506.02438. Defaults: eps 0.2 (both); gamma = lam = 1, the practice
with language models; c = 1 (the paper's Table 5); beta 0 (`policy: {critic: {kl: 0.05}}` switches
it on). One sample per prompt is enough, since the baseline is not the group's. The clip matters
only with several updates per batch: `learner: {updates_per_batch: M, epochs_per_batch: E}` for M
minibatches in E epochs. The same critic serves every hybrid with `policy: ppo`: see
algorithms/parts/critic.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.rl.grpo import GRPO


@dataclass
class PPO(GRPO):
    title: ClassVar[str] = "clipped policy gradient with a critic and GAE"
    paper: ClassVar[str] = "1707.06347"

    def policy_defaults(self):
        return {"preset": "ppo"}
