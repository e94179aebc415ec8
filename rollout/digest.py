"""A digest of a tensor's bytes: the same on the learner and on an engine, on a CPU and on a GPU, computed where the tensor lives.

It guards against accidents (a lost, stale, shifted or half-written tensor), not against an adversary: any change within one 8-byte word changes it
for certain, any other change with probability 1 - 2^-64.
"""
from __future__ import annotations

from functools import cache

import torch

CHUNK = 1 << 20                     # 8-byte words per pass: 8 MiB of scratch memory
MULTIPLIER = 0x9E3779B97F4A7C15     # odd; 2^64 / golden ratio
MASK = (1 << 64) - 1


@cache
def _weights(device: torch.device) -> torch.Tensor:
    """int64 [CHUNK], all odd, so that multiplying by one is invertible modulo 2^64."""
    index = torch.arange(CHUNK, dtype=torch.int64, device=device)
    mixed = (2 * index + 1) * (MULTIPLIER - (1 << 64))
    return (mixed ^ (mixed >> 29)) | 1


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor) -> str:
    """Text of dtype, shape and a 64-bit sum over the bytes, e.g. `float32[4, 2]:9f…`. Bitwise: -0.0 and 0.0 differ, equal NaN patterns agree."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if spare := data.numel() % 8:
        data = torch.cat([data, data.new_zeros(8 - spare)])
    if data.data_ptr() % 8:
        data = data.clone()         # a view into a packed buffer may start anywhere
    words = data.view(torch.int64)
    weights = _weights(words.device)
    total = 0
    for part in words.split(CHUNK):
        total = (total * MULTIPLIER + int((part * weights[:len(part)]).sum())) & MASK
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}:{total:016x}"
