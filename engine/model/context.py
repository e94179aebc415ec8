"""How many positions a model was made for, and how many a run asks of it. From configs alone."""

from __future__ import annotations

from collections.abc import Iterator

from tandem.engine.config.schema import Config

STRETCHED = ("linear", "dynamic", "ntk", "yarn")  # rope kinds whose factor multiplies the context


def context_length(config) -> int | None:
    """The model's context in tokens (prompt and response together); None where its config has no
    such limit.

    `config` is a transformers PretrainedConfig. Its own names for the limit are known (GPT-2's
    n_positions). A rope that is stretched by a factor counts as long as it can be, so that a longer
    row is too long in every reading.
    """
    trained = trained_length(config)
    if trained is None:
        return None
    lengths = [trained]
    for rope in ropes(config.get_text_config()):
        factor = rope.get("factor")
        if rope_kind(rope) in STRETCHED and isinstance(factor, int | float):
            before = rope.get("original_max_position_embeddings") or trained
            lengths.append(int(before * factor))
    return max(lengths)


def rollout_context(config) -> int | None:
    """The same for rows that an engine generates: engines do not stretch a dynamic rope."""
    dynamic = any(rope_kind(rope) == "dynamic" for rope in ropes(config.get_text_config()))
    return trained_length(config) if dynamic else context_length(config)


def trained_length(config) -> int | None:
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def engine_length(config: Config) -> int:
    """The longest row, in tokens, that vLLM is told to make room for in this run."""
    longest_response = max(config.rollout.max_tokens, config.eval.max_tokens or 0)
    return config.rollout.max_model_len or config.data.max_prompt_tokens + longest_response


def ropes(text_config) -> Iterator[dict]:
    """The rope settings of a text config: none, one, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = getattr(text_config, name, None)
        if not isinstance(settings, dict):
            continue
        nested = [value for value in settings.values() if isinstance(value, dict)]
        yield from nested or [settings]


def rope_kind(rope: dict) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"
