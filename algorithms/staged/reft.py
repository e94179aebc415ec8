"""ReFT: warm up on demonstrations, then PPO on the same questions, held near the warmed-up model by
a KL in the reward.

    stage 1    L   = - TOK_demo{ log p_t },    sft_steps steps
    stage 2    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R
               A   = whitened GAE(gamma 1, lam 0.95)
               L   = SEQ{ max( -A rho, -A clip(rho, 0.8, 1.2) ) }
                     + 5 SEQ{ 1/2 max( (V - ret)^2, (clip(V, V_old +- 0.2) - ret)^2 ) }

Source: arXiv 2401.08967 and the authors' code. pi_ref and PPO's start are the weights at the end of
stage 1, whatever they were; a checkpoint keeps them. Defaults: beta 0.01 as for program answers;
0.05 for answers in natural language. Averages are per sequence, then over sequences (SEQ), for both
terms. The recipe around it, set in the config: one sample per question, temperature 1, 2 epochs
over each batch (learner.epochs_per_batch), learning rate 1e-5 for 2 epochs of warm-up, then 3e-7,
no weight decay. The reward is 1 for a right answer, 0.1 for one that can be read but is wrong, else
0. Paper and code: the warm-up checkpoint is taken out of a longer schedule, so its learning rate
has not decayed; ours is constant unless told otherwise. A response cut at the token limit ends with
value 0 (`critic: {bootstrap: false}`), as in the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.staged.sft_rl import SFTThenRL


@dataclass
class ReFT(SFTThenRL):
    title: ClassVar[str] = (
        "SFT warm-up, then PPO with a critic and the KL to the warm-up checkpoint in the reward"
    )
    paper: ClassVar[str] = "2401.08967"

    def policy_defaults(self):
        return {
            "preset": "ppo",
            "reduction": "seq_mean_token_mean",
            "critic": {"lam": 0.95, "kl": 0.01, "coefficient": 5.0},
        }
