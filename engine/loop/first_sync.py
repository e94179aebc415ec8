"""The first weight update of a run is of the weights that the engines have already: what they
compute must not move.

An inference engine splits, fuses and packs weights for its kernels, and a reload may leave a layer
out or pack it wrongly, without a word and with every digest right (vLLM 0.32 did so with experts on
a CPU). So each engine scores fixed tokens twice before that update and once after it. The same
computation with the same weights gives the same numbers, but for the rounding that the first two
show.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import SyncError
from tandem.engine.learner.protocol import Pool
from tandem.engine.loop.sync import Sync

TOKENS = 192  # scored; random ones, so that every expert of a mixture gets some
NOISE = 4.0  # a gap may be this many times that of the two scores before the update
# a gap in bfloat16 may be this part of sync.max_mean_gap, which is a bound between two
# implementations; here one is compared with itself
BFLOAT16 = 1 / 16


def prove(sync: Sync, tokenizer) -> None:
    """Make the first update of a run, whose learner still has the weights of the model folder.

    Raises SyncError.
    """
    if not sync.pool.can_score_logprobs:
        # the pool computes in this process, replays a record, or its engines cannot score tokens
        return
    first = FirstSync(sync.pool, tokenizer, sync.config)
    sync.publish(0)
    sync.telemetry.event("first_sync", gap=first.check())


class FirstSync:
    """Make it when the engines are up, call `check` after the first update."""

    def __init__(self, pool: Pool, tokenizer, config: Config):
        self.pool, self.config = pool, config
        self.tokens = probe_tokens(tokenizer, min(TOKENS, longest(config)))
        self.before: Mapping[int, np.ndarray] = pool.logprobs(self.tokens)
        self.again: Mapping[int, np.ndarray] = pool.logprobs(self.tokens)

    def check(self) -> float:
        """The largest gap of an engine, as `gap` measures it.

        Raises SyncError if one is too large; NaN is.
        """
        after = self.pool.logprobs(self.tokens)
        engines = sorted(after.keys() & self.before.keys() & self.again.keys())
        if not engines:
            raise SyncError(
                "no engine lived through the first weight update, so that it could not be "
                "compared with what they computed before; start again"
            )
        exact = self.config.model.dtype == "float32"
        if exact:
            kind, key, bound = "largest", "sync.max_gap", self.config.sync.max_gap
        else:
            kind, key = "mean", "1/16 of sync.max_mean_gap"
            bound = BFLOAT16 * self.config.sync.max_mean_gap
        largest = 0.0
        for engine in engines:
            noise = gap(self.before[engine], self.again[engine], exact)
            found = gap(self.before[engine], after[engine], exact)
            allowed = max(NOISE * noise, bound)
            if not found <= allowed:
                raise SyncError(
                    f"engine {engine} was sent the weights it had loaded itself, and its "
                    f"log-probs of the same {len(self.tokens)} tokens moved by "
                    f"{found:.3g} ({kind}; without an update they move by {noise:.3g}), "
                    f"allowed is {allowed:.3g} ({key}). "
                    "It does not compute with the weights it is sent: this vLLM reloads some "
                    "layer of this model wrongly. Rollouts would come "
                    "from another model than the one that is trained; use another version of "
                    "vLLM, or mode=inline, which needs no reload"
                )
            largest = max(largest, found)
        return largest


def gap(a: np.ndarray, b: np.ndarray, exact: bool) -> float:
    """max |a - b| in float32, where every token must agree; else the mean, since one token's
    rounding may choose another expert.
    """
    difference = np.abs(a.astype(np.float64) - b)
    return float(difference.max() if exact else difference.mean())


def longest(config: Config) -> int:
    """Tokens that every engine can score: it samples one more behind them."""
    rollout = config.rollout
    return (rollout.max_model_len or config.data.max_prompt_tokens + rollout.max_tokens) - 1


def probe_tokens(tokenizer, count: int) -> np.ndarray:
    """int32 [count]: ordinary tokens of the vocabulary, the same for every run with it.

    Special ones may stand for images and the like.
    """
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
    return np.random.default_rng(0).choice(ordinary, count).astype(np.int32)
