"""A model's context is read from its config, whatever the config calls it."""

import pytest
import transformers

from tandem.engine.model.context import context_length, rollout_context

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "factor": 32.0,
}
PHI3 = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "original_max_position_embeddings": 32,
    "pad_token_id": 0,
    "vocab_size": 40,
}
CONFIGS = {
    "gpt2": (transformers.GPT2Config(n_positions=64), 64),
    "opt": (transformers.OPTConfig(max_position_embeddings=50), 50),
    "llama": (transformers.LlamaConfig(max_position_embeddings=70), 70),
    "yarn": (transformers.Qwen3Config(max_position_embeddings=1000, rope_scaling=YARN), 4000),
    "llama3": (transformers.LlamaConfig(max_position_embeddings=4096, rope_scaling=LLAMA3), 4096),
    "longrope": (
        transformers.Phi3Config(max_position_embeddings=1024, rope_scaling=LONG, **PHI3),
        1024,
    ),
    "a rope per layer type": (transformers.Gemma3TextConfig(max_position_embeddings=90), 90),
    "text part of a larger model": (
        transformers.Gemma3Config(text_config={"max_position_embeddings": 80}),
        80,
    ),
    "no positions": (transformers.BloomConfig(), None),
    "recurrent": (transformers.MambaConfig(), None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_context_length(name):
    config, expected = CONFIGS[name]
    assert context_length(config) == expected


def test_engines_do_not_stretch_a_dynamic_rope():
    rope = {"rope_type": "dynamic", "factor": 4.0}
    config = transformers.LlamaConfig(max_position_embeddings=100, rope_scaling=rope)
    assert context_length(config) == 400 and rollout_context(config) == 100
    assert rollout_context(CONFIGS["yarn"][0]) == 4000
