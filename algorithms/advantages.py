"""Advantage estimators on the rewards of one group (all samples of one prompt). Each maps float [n] to float32 [n].

Adding a constant to all rewards changes nothing; a group whose rewards are all equal gets zeros.
"""
from __future__ import annotations

import numpy as np


def grpo(rewards, epsilon: float = 1e-6) -> np.ndarray:
    """(R - mean) / (std + epsilon), unbiased std; a group of one gets 0. GRPO, arXiv 2402.03300 eq. 3; epsilon as in verl."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2:
        return np.zeros(len(r), np.float32)
    return ((r - r.mean()) / (r.std(ddof=1) + epsilon)).astype(np.float32)


def dr_grpo(rewards) -> np.ndarray:
    """R - mean: no division by the spread, which favours prompts that are nearly solved or nearly hopeless. Dr.GRPO, arXiv 2503.20783."""
    r = np.asarray(rewards, np.float64)
    return (r - r.mean()).astype(np.float32) if len(r) else r.astype(np.float32)


def rloo(rewards) -> np.ndarray:
    """R_i - mean of the others = n/(n-1) (R_i - mean); a group of one gets 0. RLOO, arXiv 2402.14740."""
    r = np.asarray(rewards, np.float64)
    if len(r) < 2:
        return np.zeros(len(r), np.float32)
    return ((r - r.mean()) * len(r) / (len(r) - 1)).astype(np.float32)


ESTIMATORS = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
