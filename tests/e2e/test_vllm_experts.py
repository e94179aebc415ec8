"""A mixture of experts in a real vLLM engine on a CPU: weights that are sent to it are what it
computes with, and where they are not the run would stop. One engine start; the slow tests have one
each.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from vllm_rig import CONFIG, running

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import SyncError
from tandem.engine.loop.first_sync import FirstSync

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

PROMPT = [1, 20, 21, 22, 23, 24]


def make_model(folder, experts: int, kind: str):
    """A small Qwen3-MoE or Mixtral with the tokenizer of tandem:tiny.

    `experts`: width of one; the CPU kernel pads it to a multiple of 32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, Qwen3MoeConfig

    from tandem.engine.model.tiny import make_tiny

    tokenizer = AutoTokenizer.from_pretrained(make_tiny(folder / "tiny", hidden=64, layers=1))
    torch.manual_seed(0)
    common = dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        num_experts_per_tok=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    if kind == "mixtral":
        config = MixtralConfig(**common, num_local_experts=4, intermediate_size=experts)
    else:
        config = Qwen3MoeConfig(
            **common, num_experts=4, moe_intermediate_size=experts, norm_topk_prob=True
        )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "experts")
    tokenizer.save_pretrained(folder / "experts")
    return folder / "experts", tokenizer


class OneEngine:
    """The rig's engine as a pool of one."""

    def __init__(self, rig):
        self.rig = rig

    def logprobs(self, tokens):
        return {0: self.rig.wait(self.rig.backend.logprobs(tokens))}


def forget(rig, what: str) -> None:
    """Replace the repair in the engine's process, or bring it back."""
    rig.in_worker(
        "import tandem.rollout.vllm.worker as w, tandem.rollout.vllm.experts as e; "
        f"w.forget_packed_experts = {what}"
    )


def check(folder, dtype: str, experts: int, provoke: bool, kind: str = "qwen") -> None:
    path, tokenizer = make_model(folder, experts, kind)
    config = replace(CONFIG, model=ModelConfig(path=str(path), dtype=dtype))
    with running(path, config) as rig:
        if dtype == "float32":
            assert rig.gap(rig.generate(PROMPT)) < 1e-4
        first = FirstSync(OneEngine(rig), tokenizer, config)
        assert (
            len(first.tokens) == 192
            and np.isfinite(first.before[0]).all()
            and len(first.before[0]) == 191
        )
        if provoke:
            forget(rig, "lambda model: None")
            rig.sync()
            with pytest.raises(
                SyncError, match="this vLLM reloads some layer of this model wrongly"
            ):
                first.check()
            forget(rig, "e.forget_packed_experts")
        held = []
        for _ in range(2):
            held.append(rig.sync().installed[0].active_digest)
            assert first.check() == 0, "the same weights, to the bit"
        assert held[0] == held[1], (
            "by which an engine in the place of a dead one is compared with the others"
        )
        rig.change_weights()
        rig.sync()
        with pytest.raises(SyncError):
            first.check()
        bound = 1e-4 if dtype == "float32" else 0.5
        assert rig.gap(rig.generate(PROMPT)) < bound


def test_experts_are_reloaded_to_the_bit_and_a_wrong_reload_is_found(tmp_path):
    check(tmp_path, "float32", experts=96, provoke=True)


@pytest.mark.slow
def test_the_same_in_bfloat16(tmp_path):
    check(tmp_path, "bfloat16", experts=96, provoke=True)


@pytest.mark.slow
def test_experts_that_the_kernel_pads(tmp_path):
    """Without the repair their reload does not fit and fails."""
    check(tmp_path, "float32", experts=80, provoke=False)


@pytest.mark.slow
def test_experts_whose_names_transformers_changes(tmp_path):
    """They are sent under the names of the checkpoint: vLLM knows no others."""
    check(tmp_path, "float32", experts=96, provoke=True, kind="mixtral")
