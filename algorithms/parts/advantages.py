"""Advantage estimators: from the rewards of a batch to one advantage per sample.

Each takes `rewards`, a list with one float [n] per group (all samples of a prompt), and `lengths`,
their trained tokens, and returns a list of float32 [n]. The group estimators treat every group
alone; the whitening ones need the batch. Adding a constant to all rewards of a group changes
nothing in the group estimators, and a group whose rewards are all equal gets zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Groups = Sequence[np.ndarray]


def grpo(rewards, lengths=None, epsilon: float = 1e-6) -> list[np.ndarray]:
    """(R - mean) / (std + epsilon), unbiased std; a group of one gets 0.

    GRPO, arXiv 2402.03300 sec. 4.1.2; epsilon as in verl.
    """

    def standardised(r: np.ndarray) -> np.ndarray:
        spread = r.std(ddof=1) + epsilon
        return (r - r.mean()) / spread

    return each_group(rewards, standardised)


def dr_grpo(rewards, lengths=None) -> list[np.ndarray]:
    """R - mean: no division by the spread, which favours prompts that are nearly solved or nearly
    hopeless. Dr.GRPO, arXiv 2503.20783.
    """
    return each_group(rewards, centred)


def rloo(rewards, lengths=None) -> list[np.ndarray]:
    """R_i - mean of the others = n/(n-1) (R_i - mean). RLOO, arXiv 2402.14740."""

    def above_others(r: np.ndarray) -> np.ndarray:
        n = len(r)
        return centred(r) * n / (n - 1)

    return each_group(rewards, above_others)


def reinforce_pp(rewards, lengths) -> list[np.ndarray]:
    """R whitened over all trained tokens of the batch.

    REINFORCE++, arXiv 2501.03262, with discount 1 and without the KL in the reward.
    """
    values = in_float64(rewards)
    return whiten(values, lengths)


def reinforce_pp_baseline(rewards, lengths) -> list[np.ndarray]:
    """R - mean of the group, then whitened over all trained tokens of the batch.

    REINFORCE++ with baseline, arXiv 2501.03262.
    """
    values = []
    for r in rewards:
        mean = np.mean(r)
        values.append(np.asarray(r, np.float64) - mean)
    return whiten(values, lengths)


def raw(rewards, lengths=None) -> list[np.ndarray]:
    """R itself: REINFORCE without baseline."""
    return [np.asarray(r, np.float32) for r in rewards]


def gae(rewards, lengths=None) -> list[np.ndarray]:
    """R itself, from which algorithms/parts/critic.py makes advantages per token once the values
    are known.
    """
    return raw(rewards)


ESTIMATORS: dict[str, Callable[..., list[np.ndarray]]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "raw": raw,
    "gae": gae,
}

# compare the samples of a prompt: alone, each has advantage 0
GROUP_RELATIVE = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")


def each_group(rewards: Groups, estimate: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """A group of one, or without spread, has nothing to be compared with: exactly 0, where rounding
    in mean and std would leave a rest.
    """
    found = []
    for r in in_float64(rewards):
        advantages = np.zeros(len(r))
        if len(r) > 1 and np.ptp(r) > 0:
            advantages = estimate(r)
        found.append(advantages.astype(np.float32))
    return found


def centred(r: np.ndarray) -> np.ndarray:
    return r - r.mean()


def in_float64(groups: Groups) -> list[np.ndarray]:
    return [np.asarray(group, np.float64) for group in groups]


def whiten(values: Sequence[np.ndarray], lengths: Groups) -> list[np.ndarray]:
    """Subtract the mean and divide by the (unbiased) standard deviation that the values have over
    tokens, a sample counting as often as it has tokens.
    """
    if not values:
        return []
    v = np.concatenate(values)
    n = np.concatenate(in_float64(lengths))
    total = max(n.sum(), 1.0)
    mean = (v * n).sum() / total
    squares = (v - mean) ** 2
    degrees = max(total - 1.0, 1.0)
    variance = (squares * n).sum() / degrees
    spread = np.sqrt(variance) + 1e-8
    whitened = []
    for group in values:
        advantages = (group - mean) / spread
        whitened.append(advantages.astype(np.float32))
    return whitened
