"""One-Token Rollout: at every token of a demonstration the policy draws single tokens, and a policy
gradient rewards those that are the demonstration's.

    a_1 .. a_K ~ pi'(.|s_t) = softmax(z / kappa),    R(a) = 1 if a = y_t, else beta
    sampled   l_t = -1/K sum_k R(a_k) log pi(a_k|s_t)
    exact     l_t = -sum_a sg[pi'(a)] R(a) log pi(a|s_t),    its expectation over the draws
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.core.text import closest
from tandem.engine.model.drawn import DRAWS, DrawnReward, ExpectedReward
from tandem.engine.model.quantities import Quantity

MODES = ("sampled", "exact")
REWARD = "one_token_reward"


@dataclass(frozen=True)
class OneTokenRollout:
    """Source: One-Token Rollout, row 6 of the catalogue, from reviews that quote the objective;
    K = 256 is confirmed there. UNVERIFIED: beta -0.1 and kappa 1.3. The paper averages over each
    row's tokens (`reduction: seq_mean_token_mean`); the default is the method's, over all tokens.

    With kappa 1 the expected gradient is that of DFT times 1 - beta: only few draws and another
    kappa make it differ. The draws of a token depend on the seed of the run, the step, its row and
    its position, so they are the same in any micro-batch.
    """

    samples: int = 256
    beta: float = -0.1
    kappa: float = 1.3
    mode: str = "sampled"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(
                f"objective one_token: mode is {self.mode!r}{closest(self.mode, MODES)}; known: "
                f"{', '.join(MODES)}"
            )
        if self.samples < 1:
            raise ValueError(f"objective one_token: samples is {self.samples}, must be at least 1")
        if self.kappa <= 0:
            raise ValueError(f"objective one_token: kappa is {self.kappa}, must be more than 0")

    @property
    def quantities(self) -> Mapping[str, Quantity]:
        if self.mode == "exact":
            return {REWARD: ExpectedReward(self.beta, self.kappa)}
        return {REWARD: DrawnReward(self.beta, self.kappa, self.samples)}

    def brings(self, tokens: int, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
        """{stream: float32 [tokens]} for one row."""
        if self.mode == "exact":
            return {}
        return {DRAWS: rng.integers(0, 1 << 24, tokens).astype(np.float32)}

    def __call__(self, tokens: Tokens):
        return -tokens[REWARD], {"p": tokens.logp.detach().exp()}
