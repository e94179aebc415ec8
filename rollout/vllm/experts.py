"""Experts on a CPU, packed anew in every weight update.

vLLM 0.32 packs the weights of a mixture-of-experts layer for its CPU kernel when it loads them
first. A reload leaves that out: the kernel then reads plain weights as if they were packed, and
log-probs are off by a few hundredths, without a word. Where the packing pads, the reload fails.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


def forget_packed_experts(model: torch.nn.Module) -> None:
    """To be called before a reload: without a kernel, vLLM does for every such layer what it did at
    the first load, packing included.
    """
    for layer in model.modules():
        method: Any = getattr(layer, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        if isinstance(getattr(kernel, "fused_experts", None), CPUUnquantizedExperts):
            method.moe_kernel = None
