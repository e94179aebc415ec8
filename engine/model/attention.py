"""Attention of bfloat16 models on a CPU in float32, where that is faster.

PyTorch's CPU kernel takes the backward pass of short bfloat16 bins 2 to 9 times slower than that of
float32 ones (bins of 135 to 16 tokens; about even at 300), so bins up to SHORT are cast for the
attention alone. It is exact where bfloat16 rounds; nothing else changes, and on a GPU nothing at
all.
"""

from __future__ import annotations

import torch

SHORT = 256  # tokens
NAME = "sdpa_cpu"


def use_fast_attention(model) -> None:
    """Switch a transformers model that runs with SDPA to `attend`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attend(module, query, key, value, attention_mask, **options):
    """transformers' SDPA, in float32 for short queries that need a gradient."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    slow = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.requires_grad
    if not slow or query.shape[-2] > SHORT:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, weights = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **options
    )
    return out.to(query.dtype), weights
