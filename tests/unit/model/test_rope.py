"""Ropes that depend on a row's length: a packed row is what it would be alone, whatever stands
beside it.
"""

import pytest
import torch
import transformers

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.load import load_policy
from tandem.engine.model.policy import Policy
from tandem.engine.model.rope import follow_engines, separate_rows
from tandem.engine.model.self_check import can_share, self_check
from tandem.engine.model.view import View

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
SWITCH = 16


def make_config(name):
    if name == "longrope":
        return transformers.Phi3Config(
            **SIZES,
            max_position_embeddings=64,
            rope_scaling=LONG,
            original_max_position_embeddings=SWITCH,
        )
    return transformers.LlamaConfig(**SIZES, max_position_embeddings=SWITCH, rope_scaling=DYNAMIC)


def make_model(name):
    """Weights large enough that positions show in the log-probs."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model


def packed(policy, rows):
    """Log-probs of every row but its first token, all rows in one line."""
    tokens = torch.cat(rows)
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    index = positions.nonzero().squeeze(-1) - 1
    logp = policy(View.of_one_row(tokens[None], positions[None], index, tokens[index + 1]))["logp"]
    return logp.split([len(row) - 1 for row in rows])


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
@torch.no_grad()
def test_rows_on_both_sides_of_the_switch(name):
    lengths = [9, 40, SWITCH, SWITCH + 1, 12, 30, 40]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(40, (length,), generator=generator) for length in lengths]
    alone = []
    for row in rows:
        fresh = make_model(name)  # the library's own forward, with no memory of other rows
        log_p = fresh(input_ids=row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        alone.append(log_p.gather(-1, row[1:, None]).squeeze(-1))
    plain = Policy(make_model(name))
    gap = max((a - b).abs().max() for a, b in zip(packed(plain, rows), alone, strict=True))
    assert gap > 0.01, "transformers alone would mix them"
    model = make_model(name)
    separate_rows(model)
    for found, expected in zip(packed(Policy(model), rows), alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not can_share(Policy(model)), "a shared prompt would have two lengths"


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_the_check_at_load_time_sees_such_a_rope(name):
    with pytest.raises(ConfigError, match=f"{name}.*longest row of a pack"):
        self_check(Policy(make_model(name)), ModelConfig(path="some/model"))


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_a_loaded_model_keeps_rows_apart(name, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    policy = load_policy(ModelConfig(path=str(tmp_path)))
    rows = [torch.arange(1, 9), torch.arange(40)]
    with torch.no_grad():
        torch.testing.assert_close(
            packed(policy, rows)[0], packed(policy, rows[:1])[0], rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_long_factors_for_all_rows_as_an_engine_has_them():
    model = make_model("longrope")
    separate_rows(model)
    row = torch.arange(1, 9)
    policy = Policy(model)
    follow_engines(model, longest=SWITCH)
    assert not model.model.rotary_emb.always_long
    follow_engines(model, longest=SWITCH + 1)
    (found,) = packed(policy, [row])
    only_long = make_config("longrope")
    only_long.rope_parameters["short_factor"] = LONG["long_factor"]
    expected = transformers.AutoModelForCausalLM.from_config(only_long).eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, packed(Policy(expected), [row])[0], rtol=0, atol=1e-5)
