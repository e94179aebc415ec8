"""Whole runs in one process over model families: rollouts and learner agree, and the saved model is
read back as the one that was trained.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers

from tandem.engine.model.tiny import make_tokenizer
from tandem.engine.model.weight_files import tensor_shapes
from tandem.launch import cli

CONFIG = """
mode: inline
model: {path: model}
data:
  prompts: {path: "task:sort", options: {digits: 3}}
  experts: {path: "task:sort", options: {digits: 3, size: 8}}
  max_prompt_tokens: 24
  max_expert_tokens: 16
  experts_per_step: 2
method: {name: chord_mu, mu: 0.3}
rollout: {prompts_per_step: 2, samples_per_prompt: 2, max_tokens: 8}
reward: {functions: ["short.py:score"]}
learner: {learning_rate: 1.0e-3, micro_batch_tokens: 64}
run: {name: r, steps: 2}
"""
REWARD = "def score(completion, **columns):\n    return float(len(completion) % 3)\n"
TOKENIZER = make_tokenizer()
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": TOKENIZER.pad_token_id,
    "bos_token_id": TOKENIZER.bos_token_id,
    "eos_token_id": TOKENIZER.eos_token_id,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=len(TOKENIZER),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
        eos_token_id=TOKENIZER.eos_token_id,
        bos_token_id=TOKENIZER.bos_token_id,
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES,
        head_dim=16,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "granite": lambda: transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": lambda: transformers.CohereConfig(**SIZES, logit_scale=0.25),
    "phi3, long rope below its switch": lambda: transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=40, rope_scaling=LONG
    ),
    "phi3, long rope beyond its switch": lambda: transformers.Phi3Config(
        **SIZES, original_max_position_embeddings=10, rope_scaling=LONG
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SIZES,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_and_its_saved_model(in_tmp, name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, buffer.numel()))
    model.save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    Path("c.yaml").write_text(CONFIG)
    Path("short.py").write_text(REWARD)
    attention = "eager" if name == "gemma2" else "sdpa"
    assert cli.main(["train", "c.yaml", f"model.attention={attention}"]) == 0
    events = [json.loads(line) for line in Path("runs/r/events.jsonl").read_text().splitlines()]
    gates = [event["max_gap"] for event in events if event["kind"] == "gate"]
    assert gates and max(gates) < 1e-4
    assert tensor_shapes(Path("runs/r/model")) == tensor_shapes(Path("model"))
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        "runs/r/model", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    trained = dict(loaded.named_parameters())
    assert any(
        not torch.equal(parameter, trained[key]) for key, parameter in model.named_parameters()
    )
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, loaded.get_buffer(key)), key
