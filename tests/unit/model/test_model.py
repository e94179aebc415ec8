"""Packed log-probs and gradients equal those of each row alone; models for which they would not are
refused, and so are broken folders.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers

from tandem.algorithms.base import Term
from tandem.algorithms.parts.objectives.nll import NLL
from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Row, Source
from tandem.engine.learner.packing import pack
from tandem.engine.model.load import load_policy
from tandem.engine.model.policy import Policy, hf_parameters
from tandem.engine.model.resolve import load_tokenizer, resolve_model
from tandem.engine.model.self_check import can_share, self_check
from tandem.engine.model.view import View

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=256,
)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, untied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral, sliding window": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "gemma3, alternating windows": lambda: transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=6
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=256
    ),
    "gemma2, capped": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=6,
        attn_implementation="eager",
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "granite, scaled": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=8.0),
    "cohere, scaled": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "phi, head with bias": lambda: transformers.PhiConfig(**{**SIZES, "num_key_value_heads": 2}),
}


SHARING = {
    "llama",
    "llama, untied",
    "qwen3",
    "phi, head with bias",
    "gpt2",
    "granite, scaled",
    "cohere, scaled",
}  # the others have windows, which a mask of ours would take away


def make_model(config, dtype=torch.float32):
    """Random weights, large enough that what a token attends to shows in its log-probs."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.to(dtype).eval()


def make_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for length in lengths:
        weight = (rng.random(length) < 0.8).astype(np.float32)
        weight[0], weight[-1] = 0, 1
        rows.append(
            Row(
                rng.integers(0, 96, length).astype(np.int32),
                np.full(length, Source.EXPERT, np.int8),
                {"x": weight},
            )
        )
    return rows


def micro_batches(rows, budget=90):
    """Ragged rows in several bins each; some bins have a padded tail."""
    (micros,) = pack(rows, [Term("x", NLL())], 1, budget, version=0)
    assert any(micro.tokens.shape[0] > 1 for micro in micros) and any(
        micro.real_tokens - len(micro.rows) < micro.tokens.size for micro in micros
    )
    return micros


def run(policy, micro, temperature=1.0, chunk=7, entropy=True):
    tensor = torch.as_tensor
    view = View.of_one_row(
        tensor(micro.tokens), tensor(micro.positions), tensor(micro.index), tensor(micro.target)
    )
    found = policy(replace(view, temperature=temperature, chunk=chunk, entropy=entropy))
    return found["logp"], found.get("entropy")


def alone(model, row, temperature=1.0):
    """log-probs of the row's trained tokens and the entropies there, by the model's own forward."""
    tokens = torch.as_tensor(row.tokens).long()
    log_p = (
        model(input_ids=tokens[None], use_cache=False).logits[0, :-1] / temperature
    ).log_softmax(-1)
    trained = torch.as_tensor(row.trained)[1:]
    return log_p.gather(-1, tokens[1:, None]).squeeze(-1)[trained], -(log_p.exp() * log_p).sum(-1)[
        trained
    ]


LENGTHS = (31, 27, 22, 17, 13, 2, 3, 29, 23, 19)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_packed_equals_alone(name):
    model, rows = make_model(CONFIGS[name]()), make_rows(LENGTHS)
    for micro in micro_batches(rows):
        logp, entropy = run(Policy(model), micro, temperature=0.7)
        expected = [
            torch.cat(both)
            for both in zip(
                *(alone(model, rows[i], temperature=0.7) for i in micro.rows), strict=True
            )
        ]
        torch.testing.assert_close(logp, expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy, expected[1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_mask_or_a_cache_would_mix_packed_rows():
    """The reason for the one call signature.

    If this fails, transformers has changed, and perhaps for the better.
    """
    policy, rows = Policy(make_model(CONFIGS["llama"]())), make_rows(LENGTHS)
    micro = micro_batches(rows)[0]
    inputs = dict(
        input_ids=torch.as_tensor(micro.tokens), position_ids=torch.as_tensor(micro.positions)
    )
    for wrong in (
        dict(attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False),
        dict(use_cache=True),
    ):
        hidden = policy.model.get_decoder()(**inputs, **wrong)[0].flatten(0, 1)[
            torch.as_tensor(micro.index)
        ]
        logp, _ = policy.head(hidden, torch.as_tensor(micro.target), 1.0, 64, False)
        assert (logp - run(policy, micro)[0]).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradient_equals_alone(checkpointing):
    model, rows = make_model(CONFIGS["llama"]()), make_rows(LENGTHS)
    loss = (
        sum(
            logp.sum() + 0.3 * entropy.sum()
            for logp, entropy in (alone(model, row) for row in rows)
        )
        / 100
    )
    expected = torch.autograd.grad(loss, list(model.parameters()))
    policy = Policy(model)
    if checkpointing:
        policy.enable_gradient_checkpointing()
        policy.train()
    for micro in micro_batches(rows):
        logp, entropy = run(policy, micro)
        ((logp.sum() + 0.3 * entropy.sum()) / 100).backward()
    for (name, parameter), gradient in zip(hf_parameters(policy), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 1e-5 * gradient.norm(), name


def kept_elements(policy) -> int:
    """How many numbers a forward keeps for its backward."""
    kept = []

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run(policy, micro_batches(make_rows(LENGTHS))[0])
    return sum(kept)


def test_checkpointing_keeps_fewer_activations():
    sizes = []
    for checkpointing in (False, True):
        policy = Policy(make_model(transformers.LlamaConfig(**{**SIZES, "num_hidden_layers": 8})))
        if checkpointing:
            policy.enable_gradient_checkpointing()
        sizes.append(kept_elements(policy))
    assert sizes[1] < sizes[0] / 3


def test_dropout_stays_off_in_training():
    config = CONFIGS["gpt2"]()
    assert config.attn_pdrop > 0
    policy, micro = Policy(make_model(config)).train(), micro_batches(make_rows(LENGTHS))[0]
    policy.enable_gradient_checkpointing()
    assert policy.training and torch.equal(run(policy, micro)[0], run(policy, micro)[0])


@torch.no_grad()
def test_bins_in_one_line_as_flash_attention_needs_them():
    policy, rows = Policy(make_model(CONFIGS["llama"]())), make_rows(LENGTHS)
    for micro in micro_batches(rows):
        policy.one_line = False
        expected = run(policy, micro)[0]
        policy.one_line = True
        torch.testing.assert_close(run(policy, micro)[0], expected, rtol=0, atol=1e-5)


def test_no_trained_token_still_runs_backward():
    policy = Policy(make_model(CONFIGS["llama"]()))
    ((micro,),) = pack([], [Term("x", NLL())], 1, 64, version=0)
    logp, entropy = run(policy, micro)
    (logp.sum() + entropy.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())


@pytest.fixture
def folder(tmp_path):
    """A tied model with its tokenizer, saved as a Hugging Face folder."""
    from tandem.engine.model.tiny import make_tiny

    return make_tiny(tmp_path / "model", hidden=32, layers=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load(folder, dtype):
    policy = load_policy(ModelConfig(path=str(folder), dtype=dtype))
    assert {p.dtype for p in policy.parameters()} == {
        getattr(torch, dtype)
    } and not policy.model.training
    names = [name for name, _ in hf_parameters(policy)]
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as saved:
        assert sorted(names) == sorted(saved.keys()), (
            "tied weights once, under the checkpoint's names"
        )
    assert len(list(policy.parameters())) == len(names)


def test_tiny_is_made_once(in_tmp):
    path = resolve_model(ModelConfig(path="tandem:tiny"))
    before = (in_tmp / "models/tiny/model.safetensors").stat().st_mtime_ns
    assert resolve_model(ModelConfig(path="tandem:tiny")) == path == str(in_tmp / "models/tiny")
    assert (in_tmp / "models/tiny/model.safetensors").stat().st_mtime_ns == before
    assert (
        load_tokenizer(ModelConfig(path="tandem:tiny")).eos_token_id
        == load_policy(ModelConfig(path="tandem:tiny")).model.config.eos_token_id
    )


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def refused(action, *parts):
    with pytest.raises(ConfigError) as error:
        action()
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "\n" not in str(error.value)


def test_models_that_are_not_there(folder, tmp_path):
    for path in (str(tmp_path / "none"), "./none", "no/such-model"):
        refused(partial(load_policy, ModelConfig(path=path)), "model.path", path)
    (tmp_path / "empty").mkdir()
    refused(lambda: load_policy(ModelConfig(path=str(tmp_path / "empty"))), "config.json")
    refused(
        lambda: load_policy(ModelConfig(path=str(folder), attention="nonsense")),
        "attention",
        "nonsense",
    )


def test_missing_weights_are_refused(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    refused(lambda: load_policy(ModelConfig(path=str(folder))), "model.layers.0.mlp.up_proj.weight")
    (folder / "model.safetensors").unlink()
    refused(lambda: load_policy(ModelConfig(path=str(folder))), "could not be loaded")


@pytest.mark.parametrize("token, message", [("eos_token", "no EOS"), ("pad_token", "no pad")])
def test_tokenizer_without_a_token_is_refused(folder, token, message):
    edit(folder / "tokenizer_config.json", **{token: None})
    refused(lambda: load_tokenizer(ModelConfig(path=str(folder))), message, "tokenizer_config.json")


def test_tokenizer_that_does_not_fit_is_refused(folder, tmp_path):
    edit(folder / "config.json", vocab_size=50)
    refused(lambda: load_tokenizer(ModelConfig(path=str(folder))), "vocabulary of 50")
    refused(
        lambda: load_tokenizer(ModelConfig(path=str(folder), tokenizer=str(tmp_path / "none"))),
        "model.tokenizer",
    )


# Transformers packs none of these exactly, and says nothing.
LEAKS = {
    "lfm2, convolutions": lambda: transformers.Lfm2Config(**SIZES, full_attn_idxs=[1]),
    "falcon, ALiBi": lambda: transformers.FalconConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=True
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LEAKS)
def test_models_that_mix_packed_sequences_are_refused(tmp_path, name, dtype):
    make_model(LEAKS[name]()).save_pretrained(tmp_path)
    refused(
        lambda: load_policy(ModelConfig(path=str(tmp_path), dtype=dtype)), "mixes packed sequences"
    )


HEADS = ("gemma2, capped", "granite, scaled", "cohere, scaled")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", HEADS)
def test_models_with_scaled_or_capped_logits_load(tmp_path, name, dtype):
    make_model(CONFIGS[name]()).save_pretrained(tmp_path)
    attention = "eager" if "gemma2" in name else "sdpa"
    load_policy(ModelConfig(path=str(tmp_path), dtype=dtype, attention=attention))


@pytest.mark.parametrize("name", HEADS)
def test_gradients_through_scaled_or_capped_logits(name):
    model = make_model(CONFIGS[name]()).double()
    row = make_rows([23])[0]
    logp, entropy = alone(model, row, temperature=0.7)
    loss = logp.sum() + 0.3 * entropy.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    ((micro,),) = pack([row], [Term("x", NLL())], 1, 64, version=0)
    logp, entropy = run(Policy(model), micro, temperature=0.7)
    found = torch.autograd.grad(logp.sum() + 0.3 * entropy.sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_attention_that_would_lose_its_cap_is_refused(tmp_path):
    make_model(CONFIGS["gemma2, capped"]()).save_pretrained(tmp_path)
    refused(
        lambda: load_policy(ModelConfig(path=str(tmp_path))),
        "attn_logit_softcapping",
        "model.attention=eager",
    )


def test_a_head_with_an_unknown_twist_is_refused():
    model = make_model(CONFIGS["llama"]())
    self_check(Policy(model), ModelConfig(path="twisted"))
    original = model.forward

    def twisted(**inputs):
        out = original(**inputs)
        out.logits = out.logits * 0.9
        return out

    model.forward = twisted
    refused(
        lambda: self_check(Policy(model), ModelConfig(path="twisted")),
        "twisted",
        "not a linear map",
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_are_shared_where_the_model_allows_it(name):
    policy = Policy(make_model(CONFIGS[name]()))
    assert can_share(policy) == (name in SHARING)
    policy.model.set_attn_implementation("eager")
    assert not can_share(policy)
