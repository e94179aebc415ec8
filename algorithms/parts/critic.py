"""A critic for the RL half of a method: GAE advantages from a value head, with the KL to the
reference in the reward. `policy: {advantage: gae, critic: {...}}`

    r_t     = -kl (log pi_old(y_t) - log pi_ref(y_t)) + 1[t = T] R
    delta_t = r_t + gamma V_{t+1} - V_t,    V_{T+1} = 0
    A_t     = delta_t + gamma lam A_{t+1},  whitened after returns are taken
    ret_t   = A_t + V_t
    L      += coefficient RED{ 1/2 max( (V - ret)^2,
                                        (clamp(V, V_old - clip, V_old + clip) - ret)^2 ) }

Sources: GAE arXiv 1506.02438 eq. 16; PPO arXiv 1707.06347; whitening, value clip and the KL in the
reward as in the code of ReFT (arXiv 2401.08967) and verl. V_t is the value of the state in which
y_t is chosen: the head reads the hidden state that predicts y_t. The steps of an episode are the
row's trained tokens, so a tool's output between two of them is skipped: V_{t+1} is the value at the
next token of our own. V and log pi_old are those from before the update. A response cut at
max_tokens ends with V_{T+1} = 0, as in ReFT's code, or with `bootstrap: true` with the critic's
value of the state it was cut in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.advantages import whiten
from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.engine.core.types import Finish, Row, Source, Trajectory


@dataclass(frozen=True)
class ValueLoss:
    """1/2 max( (V - ret)^2, (clamp(V, V_old - clip, V_old + clip) - ret)^2 ); clip None: the first
    alone.
    """

    clip: float | None = 0.2

    def __call__(self, tokens: Tokens):
        value = tokens["value"]
        returns = tokens["returns"]
        loss = (value - returns) ** 2
        metrics = {
            "value": value.detach(),
            "error": loss.detach(),
        }
        if self.clip is not None:
            old_value = tokens["old_value"]
            moved = value - old_value
            near = old_value + moved.clamp(-self.clip, self.clip)
            near_loss = (near - returns) ** 2
            loss = torch.maximum(loss, near_loss)
            clipped = moved.detach().abs() > self.clip
            metrics["clip_fraction"] = clipped.float()
        return 0.5 * loss, metrics


@dataclass
class Critic:
    """Options of `critic:`. coefficient and clip as in PPO's own experiments (its Table 5; ReFT has
    5), lam = 1 as is usual for language models.
    """

    gamma: float = 1.0
    lam: float = 1.0
    # beta of the KL in the reward; anything but 0 loads a frozen reference model
    kl: Schedule = Schedule()
    coefficient: float = 1.0  # of the value loss, next to the policy's
    clip: float | None = 0.2  # of the value
    whiten: bool = True
    bootstrap: bool = False

    def __post_init__(self):
        for name in ("gamma", "lam"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"method.policy.critic.{name} is {value}, must be in [0, 1]")
        if self.coefficient <= 0:
            raise ValueError(
                f"method.policy.critic.coefficient is {self.coefficient}, must be > 0: a "
                "critic that is not trained says 0 forever"
            )

    def row(self, row: Row, trajectory: Trajectory, reward: float) -> Row:
        """The row with the value term's weights and its `reward`, until `credit` makes an advantage
        and returns of it.

        To ask for the value of the state a response was cut in, it gets one more token, which
        `credit` removes: the value there does not depend on the token, and nothing is trained on
        it.
        """
        mask = row.weights["policy"]
        row = row.with_term("value", mask.copy())
        row = row.with_streams(reward=np.float32(reward))
        was_cut = trajectory.finish == Finish.LENGTH
        if self.bootstrap and was_cut and mask.any():
            return lengthened(row)
        return row

    def terms(self, reduction: Reduction, coefficient: float) -> list[Term]:
        needs = {"value", "old_value", "returns"}
        if not self.kl.off:
            needs |= {"old_logp", "ref_logp"}
        objective = ValueLoss(self.clip)
        whole = coefficient * self.coefficient
        return [Term("value", objective, reduction, whole, needs=frozenset(needs))]

    def credit(self, rows: Sequence[Row], batch: Batch) -> list[Row]:
        """The rows with advantages and returns per token in the place of their reward."""
        rows = list(rows)
        beta = self.kl(batch.step, batch.signals)
        episodes: dict[int, Episode] = {}
        for i, row in enumerate(rows):
            weight = row.weights.get("value")
            if weight is not None and weight.any():
                rows[i], episodes[i] = self.episode(row, beta)
        advantages = [episode.advantages for episode in episodes.values()]
        if self.whiten:
            ones = [np.ones(len(a)) for a in advantages]
            advantages = whiten(advantages, ones)
        for i, advantage in zip(episodes, advantages, strict=True):
            row = rows[i]
            episode = episodes[i]
            rows[i] = row.with_streams(
                advantage=on_steps(advantage, episode.steps, row),
                returns=on_steps(episode.returns, episode.steps, row),
                reward=None,
            )
        return rows

    def episode(self, row: Row, beta: float) -> tuple[Row, Episode]:
        """The row without the token that `row` added, and its episode."""
        steps = np.flatnonzero(row.weights["value"])
        last = 0.0
        end = steps[-1]
        if row.source[end] == Source.TOOL:
            last = float(row.streams["old_value"][end])
            steps = steps[:-1]
            row = shortened(row)
        rewards = np.zeros(len(steps))
        if beta:  # the policy answers for what it sampled itself only
            old_logp = at(row, "old_logp", steps)
            ref_logp = at(row, "ref_logp", steps)
            log_ratio = old_logp - ref_logp
            sampled = row.source[steps] == Source.POLICY
            rewards -= beta * np.where(sampled, log_ratio, 0.0)
        reward = at(row, "reward", steps)
        rewards[-1] += reward[-1]
        values = at(row, "old_value", steps)
        advantages, returns = gae(rewards, values, last, self.gamma, self.lam)
        return row, Episode(steps, advantages, returns)


@dataclass(frozen=True, eq=False)
class Episode:
    """The trained tokens of one row, as steps of an episode of n steps."""

    steps: np.ndarray  # int64 [n]: positions in the row
    advantages: np.ndarray  # float64 [n]
    returns: np.ndarray  # float64 [n]


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    last: float,
    gamma: float,
    lam: float,
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), float64 [n], of one episode; `last` is the value of the state after
    its last step.
    """
    advantages = np.zeros(len(rewards))
    following_advantage = 0.0
    following_value = last
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * following_value - values[t]
        following_advantage = delta + gamma * lam * following_advantage
        advantages[t] = following_advantage
        following_value = float(values[t])
    return advantages, advantages + values


def on_steps(values: np.ndarray, steps: np.ndarray, row: Row) -> np.ndarray:
    """float32 [T]: `values` at `steps`, 0 elsewhere."""
    out = np.zeros(len(row.tokens), np.float32)
    out[steps] = values
    return out


def lengthened(row: Row) -> Row:
    """The row with one more token, whose value is asked for and which trains nothing else."""
    weights = {}
    for term, weight in row.weights.items():
        weights[term] = longer(weight, term == "value")
    streams = {}
    for name, stream in row.streams.items():
        streams[name] = longer(stream, np.nan)
    version = row.version
    if version is not None:
        version = longer(version, -1)
    return replace(
        row,
        tokens=longer(row.tokens, 0),
        source=longer(row.source, Source.TOOL),
        weights=weights,
        streams=streams,
        version=version,
    )


def longer(values: np.ndarray, last: float) -> np.ndarray:
    return np.append(values, values.dtype.type(last))


def shortened(row: Row) -> Row:
    """The row without its last token."""
    weights = {term: weight[:-1] for term, weight in row.weights.items()}
    streams = {name: stream[:-1] for name, stream in row.streams.items()}
    version = row.version
    if version is not None:
        version = version[:-1]
    return replace(
        row,
        tokens=row.tokens[:-1],
        source=row.source[:-1],
        weights=weights,
        streams=streams,
        version=version,
    )


def at(row: Row, stream: str, steps: np.ndarray) -> np.ndarray:
    """[n]: a stream of the row, one that it has, at `steps`."""
    return row.streams[stream][steps]
