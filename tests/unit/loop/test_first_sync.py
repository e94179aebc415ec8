"""The comparison around the first weight update, with scripted engines.

Real ones: tests/e2e/test_vllm_experts.py.
"""

import numpy as np
import pytest

from tandem.engine.config.schema import Config, DataConfig, ModelConfig, RolloutConfig, SyncConfig
from tandem.engine.core.errors import SyncError
from tandem.engine.loop.first_sync import TOKENS, FirstSync, longest, probe_tokens

BASE = np.linspace(-9.0, -1.0, TOKENS - 1).astype(np.float32)


class Tokenizer:
    all_special_ids = (0, 1)

    def get_added_vocab(self):
        return {"<image>": 7}

    def get_vocab(self):
        return {str(i): i for i in range(20)}


class Pool:
    """Engines whose answers are given: per engine those of before, before again, and after; None:
    the engine is dead by then.
    """

    def __init__(self, *engines):
        self.engines, self.call = engines, -1

    def logprobs(self, tokens):
        self.call += 1
        return {
            i: answers[self.call]
            for i, answers in enumerate(self.engines)
            if answers[self.call] is not None
        }


def moved(by, tokens=None):
    """Log-probs that moved at the first `tokens` tokens."""
    out = BASE.copy()
    out[:tokens] += by
    return out


def check(*engines, dtype="float32", **sync):
    first = FirstSync(
        Pool(*engines), Tokenizer(), Config(model=ModelConfig(dtype=dtype), sync=SyncConfig(**sync))
    )
    return first.check()


@pytest.mark.parametrize(
    "dtype, after",
    [
        ("float32", moved(5e-5)),  # rounding
        ("bfloat16", moved(0.003)),
        # five tokens that were sent to another expert by a rounding
        ("bfloat16", moved(0.1, tokens=5)),
    ],
)
def test_rounding_passes(dtype, after):
    assert check((BASE, BASE, after), dtype=dtype) > 0


@pytest.mark.parametrize(
    "dtype, after",
    [
        ("float32", moved(0.08)),
        ("float32", moved(1e-3, tokens=1)),  # one token is enough
        ("bfloat16", moved(0.037)),  # vLLM's experts on a CPU
        ("bfloat16", moved(0.2, tokens=12)),  # one expert of sixteen
        ("bfloat16", moved(np.nan, tokens=1)),
        ("float32", moved(np.nan, tokens=1)),
    ],
)
def test_a_wrong_layer_does_not(dtype, after):
    with pytest.raises(
        SyncError,
        match=r"engine 1 was sent the weights it had loaded itself.* moved by .* mode=inline",
    ):
        check((BASE, BASE, BASE), (BASE, BASE, after), dtype=dtype)


def test_an_engine_with_noise_of_its_own_is_judged_by_it():
    noisy = (BASE, moved(0.01), moved(-0.02))
    assert check(noisy, dtype="bfloat16") == pytest.approx(0.02, rel=1e-3)
    with pytest.raises(SyncError, match=r"without an update they move by 0.01"):
        check((BASE, moved(0.01), moved(0.1)), dtype="bfloat16")


def test_the_config_can_allow_more():
    assert check((BASE, BASE, moved(0.037)), dtype="bfloat16", max_mean_gap=1.0) > 0.03
    assert check((BASE, BASE, moved(0.037)), max_gap=0.1) > 0.03


def test_engines_that_died_meanwhile():
    assert check((BASE, None, BASE), (BASE, BASE, BASE)) == 0
    with pytest.raises(SyncError, match="no engine lived"):
        check((BASE, None, BASE))


def test_the_tokens_are_ordinary_and_fit_the_engine():
    config = Config(data=DataConfig(max_prompt_tokens=4), rollout=RolloutConfig(max_tokens=3))
    assert longest(config) == 6
    tokens = probe_tokens(Tokenizer(), 500)
    assert not {0, 1, 7} & set(tokens.tolist()) and len(set(tokens.tolist())) == 17
    assert np.array_equal(tokens, probe_tokens(Tokenizer(), 500))
