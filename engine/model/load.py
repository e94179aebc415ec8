"""A policy from its files: checked, loaded and prepared for training."""

from __future__ import annotations

from typing import Any

import torch

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import first_line
from tandem.engine.model.attention import use_fast_attention
from tandem.engine.model.export import find_origin
from tandem.engine.model.policy import Policy
from tandem.engine.model.resolve import read_config, resolve_model
from tandem.engine.model.rope import separate_rows
from tandem.engine.model.self_check import can_share, refuse_unpackable, self_check


def load_policy(model: ModelConfig) -> Policy:
    """Load the model of the config on the CPU and check that packing and the chunked head reproduce
    its own log-probs. Raises ConfigError.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = resolve_model(model)
    refuse_quantized(model, path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, model.dtype),
            attn_implementation=model.attention,
            trust_remote_code=model.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # of many types, for files that are no model
        raise ConfigError(
            f"model {model.path!r} could not be loaded with attention={model.attention!r}, "
            f"dtype={model.dtype!r}: {type(error).__name__}: {first_line(error)}"
        ) from None
    causal, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ConfigError(
            f"model {model.path!r}: its weight files lack {len(missing)} parameters, among them "
            f"{', '.join(missing[:3])}; they would stay random: export or download it again"
        )
    refuse_unpackable(causal, model)
    if model.attention == "sdpa" and model.dtype == "bfloat16":
        use_fast_attention(causal)
    separate_rows(causal)
    policy = Policy(causal)
    self_check(policy, model)
    policy.shares_prompts = can_share(policy)
    policy.origin = find_origin(causal, path)
    return policy


def refuse_quantized(model: ModelConfig, path: str) -> None:
    """Transformers would give such weights back in another dtype and layout, or in one that cannot
    be trained.
    """
    settings = getattr(read_config(model, path), "quantization_config", None)
    if settings:
        kind = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
        raise ConfigError(
            f"model {model.path!r} is quantized ({getattr(kind, 'value', kind)}: "
            "quantization_config in its config.json), so that it could neither be trained nor "
            "exported as it is; save it once in bfloat16, without quantization_config, and set "
            "model.path to that"
        )
