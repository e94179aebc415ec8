"""A critic for the RL half of a method: GAE advantages from a value head, with the KL to the reference in the reward. `policy: {advantage: gae, critic: {...}}`

    r_t   = -kl (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R                                          kl: beta
    delta = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns_t = A_t + V_t        V_{T+1} = 0
    L    += coefficient RED{ 1/2 max( (V - ret)^2, (clamp(V, V_old - clip, V_old + clip) - ret)^2 ) }     A is whitened after returns are taken

Sources: GAE arXiv 1506.02438 eq. 16; PPO arXiv 1707.06347; whitening, value clip and the KL in the reward as in the code of ReFT (arXiv 2401.08967) and verl.
V_t is the value of the state in which y_t is chosen: the head reads the hidden state that predicts y_t. The steps of an episode are the row's trained tokens,
so a tool's output between two of them is skipped: V_{t+1} is the value at the next token of our own. V and log pi_old are those from before the update.
A response cut at max_tokens ends with V_{T+1} = 0, as in ReFT's code, or with `bootstrap: true` with the critic's value of the state it was cut in.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tandem.algorithms.advantages import whiten
from tandem.algorithms.base import Batch, Term
from tandem.algorithms.objectives import Tokens
from tandem.algorithms.reductions import Reduction
from tandem.algorithms.schedules import Schedule
from tandem.engine.types import Finish, Row, Source, Trajectory


@dataclass(frozen=True)
class ValueLoss:
    """1/2 max( (V - ret)^2, (clamp(V, V_old - clip, V_old + clip) - ret)^2 ); clip None: the first alone."""

    clip: float | None = 0.2

    def __call__(self, tokens: Tokens):
        loss, value = (tokens.value - tokens.returns) ** 2, tokens.value.detach()
        metrics = {"value": value, "error": loss.detach()}
        if self.clip is not None:
            near = tokens.old_value + (tokens.value - tokens.old_value).clamp(-self.clip, self.clip)
            loss = torch.maximum(loss, (near - tokens.returns) ** 2)
            metrics["clip_fraction"] = ((value - tokens.old_value).abs() > self.clip).float()
        return 0.5 * loss, metrics


@dataclass
class Critic:
    """Options of `critic:`. coefficient and clip as in PPO's own experiments (its Table 5; ReFT has 5), lam = 1 as is usual for language models."""

    gamma: float = 1.0
    lam: float = 1.0
    kl: Schedule | float = 0.0          # beta of the KL in the reward; anything but 0 loads a frozen reference model
    coefficient: float = 1.0            # of the value loss, next to the policy's
    clip: float | None = 0.2            # of the value
    whiten: bool = True
    bootstrap: bool = False

    def __post_init__(self):
        for name in ("gamma", "lam"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"method.policy.critic.{name} is {getattr(self, name)}, must be in [0, 1]")
        if self.coefficient <= 0:
            raise ValueError(f"method.policy.critic.coefficient is {self.coefficient}, must be > 0: a critic that is not trained says 0 for ever")
        self.kl = Schedule.parse(self.kl)

    def row(self, row: Row, trajectory: Trajectory) -> Row:
        """The row with the value term's weights. To ask for the value of the state a response was cut in, it gets one more token, which `credit` removes:
        the value there does not depend on the token, and nothing is trained on it."""
        mask = row.weights["policy"]
        row = replace(row, weights={**row.weights, "value": mask.copy()})
        if not (self.bootstrap and trajectory.finish == Finish.LENGTH and mask.any()):
            return row
        longer = lambda stream, value: None if stream is None else np.append(stream, np.array(value, stream.dtype))
        return replace(row, tokens=longer(row.tokens, 0), source=longer(row.source, Source.TOOL), advantage=longer(row.advantage, 0), version=longer(row.version, -1),
                       behaviour_logp=longer(row.behaviour_logp, np.nan), weights={k: longer(w, k == "value") for k, w in row.weights.items()})

    def terms(self, reduction: Reduction, coefficient: float) -> list[Term]:
        needs = {"value", "old_value", "returns"} | (set() if self.kl.off else {"old_logp", "ref_logp"})
        return [Term("value", ValueLoss(self.clip), reduction, coefficient * self.coefficient, needs=frozenset(needs))]

    def credit(self, rows: Sequence[Row], batch: Batch) -> list[Row]:
        """Replace the rewards, which the rows carry as their advantage until here, by advantages and returns per token."""
        rows, beta, found = list(rows), self.kl(batch.step, batch.signals), {}
        for i, row in enumerate(rows):
            steps = np.flatnonzero(row.weights["value"]) if "value" in row.weights else np.zeros(0, int)
            if len(steps) == 0:
                continue
            last = 0.0
            if row.source[steps[-1]] == Source.TOOL:
                last, steps, row = float(row.old_value[steps[-1]]), steps[:-1], shortened(row)
                rows[i] = row
            rewards = np.zeros(len(steps))
            if beta:    # the policy answers for what it sampled itself only
                rewards -= beta * np.where(row.source[steps] == Source.POLICY, row.old_logp[steps] - row.ref_logp[steps], 0.0)
            rewards[-1] += row.advantage[steps[-1]]
            found[i] = steps, *gae(rewards, row.old_value[steps], last, self.gamma, self.lam)
        advantages = [a for _, a, _ in found.values()]
        if self.whiten:
            advantages = whiten(advantages, [np.ones(len(a)) for a in advantages])
        for (i, (steps, _, returns)), advantage in zip(found.items(), advantages):
            rows[i] = replace(rows[i], advantage=spread(advantage, steps, rows[i]), returns=spread(returns, steps, rows[i]))
        return rows


def gae(rewards: np.ndarray, values: np.ndarray, last: float, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), float64 [n], of one episode; `last` is the value of the state after its last step."""
    advantages, carry, following = np.zeros(len(rewards)), 0.0, last
    for t in range(len(rewards) - 1, -1, -1):
        carry = rewards[t] + gamma * following - values[t] + gamma * lam * carry
        advantages[t], following = carry, float(values[t])
    return advantages, advantages + values


def spread(values: np.ndarray, steps: np.ndarray, row: Row) -> np.ndarray:
    """float32 [T]: `values` at `steps`, 0 elsewhere."""
    out = np.zeros(len(row.tokens), np.float32)
    out[steps] = values
    return out


def shortened(row: Row) -> Row:
    """The row without its last token."""
    cut = lambda stream: None if stream is None else stream[:-1]
    names = ("tokens", "source", "advantage", "behaviour_logp", "old_logp", "ref_logp", "old_value", "version")
    return replace(row, weights={k: cut(w) for k, w in row.weights.items()}, **{name: cut(getattr(row, name)) for name in names})


def diagnostics(rows: Sequence[Row]) -> dict[str, float]:
    """How good the critic was on this batch, before the update: share of the returns' variance that it explains; and the KL to the reference per response."""
    rows = [r for r in rows if r.returns is not None and r.old_value is not None and "value" in r.weights]      # returns alone: a method's own
    if not rows:
        return {}
    at = [r.weights["value"] != 0 for r in rows]
    returns, values = (np.concatenate([s[m] for s, m in zip(stream, at)]) for stream in ([r.returns for r in rows], [r.old_value for r in rows]))
    out = {"critic/explained_variance": float(1.0 - np.var(returns - values) / max(np.var(returns), 1e-8)), "critic/return": float(returns.mean())}
    if all(r.ref_logp is not None and r.old_logp is not None for r in rows):
        out["critic/kl"] = float(np.mean([(r.old_logp[m] - r.ref_logp[m]).sum() for r, m in zip(rows, at)]))
    return out
