"""Numbers about the rows that a step trains on, as they were before the update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.engine.core.types import Row


def critic_diagnostics(rows: Sequence[Row]) -> dict[str, float]:
    """How good the critic was: the share of the returns' variance that it explains; and the KL to
    the reference per response. Nothing where there is no critic.
    """
    returns, values, kl = [], [], []
    for row in rows:
        # a method of one's own may have returns alone
        if "value" not in row.weights or not {"returns", "old_value"} <= row.streams.keys():
            continue
        steps = row.weights["value"] != 0
        returns.append(row.streams["returns"][steps])
        values.append(row.streams["old_value"][steps])
        if {"ref_logp", "old_logp"} <= row.streams.keys():
            log_ratio = row.streams["old_logp"] - row.streams["ref_logp"]
            kl.append(log_ratio[steps].sum())
    if not returns:
        return {}
    found_returns = np.concatenate(returns)
    unexplained = np.var(found_returns - np.concatenate(values)) / max(np.var(found_returns), 1e-8)
    found = {
        "critic/explained_variance": float(1.0 - unexplained),
        "critic/return": float(found_returns.mean()),
    }
    if len(kl) == len(returns):
        found["critic/kl"] = float(np.mean(kl))
    return found
