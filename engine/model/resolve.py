"""Where a model's files are, and its tokenizer: a folder, a hub name, or one of the tiny models."""

from __future__ import annotations

from pathlib import Path

from tandem.engine.config.schema import ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.hub import use_cache_if_unreachable
from tandem.engine.core.text import first_line
from tandem.engine.model.tiny import tiny_folder

TINY = "tandem:tiny"


def resolve_model(model: ModelConfig) -> str:
    """Where to load from: a local folder or a hub name.

    `tandem:tiny` is made on first use. Raises ConfigError if there is no such model.
    """
    if model.path == TINY:
        return str(tiny_folder())
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        refuse_adapter(folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"model.path is {model.path!r}: the folder has no config.json, expected a "
                "Hugging Face model folder"
            )
        return str(folder.resolve())
    if folder.is_absolute() or model.path.startswith((".", "~")):
        raise ConfigError(f"model.path is {model.path!r}: there is no such folder")
    offline = use_cache_if_unreachable()
    try:
        read_config(model, model.path)
    except ConfigError as error:
        raise ConfigError(f"{error}{offline}") from None
    return model.path


def refuse_adapter(folder: Path) -> None:
    """Raise ConfigError for a folder of LoRA adapters: what reads it needs the whole model."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} holds LoRA adapters without their model; merge them first (peft's "
            "merge_and_unload), or resume their run with scope.export=merged and run.steps one "
            "higher, which saves the whole model"
        )


def read_config(model: ModelConfig, path: str):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # a damaged config.json raises errors of many types
        where = "neither a local folder nor a model that could be loaded"
        if Path(path).is_dir():
            where = "its config.json could not be read"
        raise ConfigError(
            f"model.path is {model.path!r}: {where}: {first_line(error)}{remote_code_hint(error)}"
        ) from None


def remote_code_hint(error: Exception) -> str:
    if "trust_remote_code" not in str(error):
        return ""
    return "; set model.trust_remote_code=true if you trust the Python files of the model"


def vocabulary_size(config) -> int | None:
    """The token ids that the model of a transformers config has an embedding for."""
    return getattr(config.get_text_config(), "vocab_size", None)


def load_tokenizer(model: ModelConfig):
    """The tokenizer of `model.tokenizer`, or the model's own.

    Raises ConfigError if it is not found, has no EOS or pad, or does not fit the model.
    """
    from transformers import AutoTokenizer

    path = resolve_model(model)
    config = read_config(model, path)
    source = model.tokenizer or path
    key = "model.tokenizer" if model.tokenizer else "model.path"
    offline = "" if Path(source).exists() else use_cache_if_unreachable()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code)
    # the tokenizers library raises bare Exceptions for a damaged tokenizer.json
    except Exception as error:
        raise ConfigError(
            f"{key} is {source!r}: no tokenizer could be loaded from there: "
            f"{first_line(error)}{remote_code_hint(error)}{offline}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {key} {source!r} has no EOS token: responses could never end; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"the tokenizer of {key} {source!r} has no pad token, which batched generation needs; "
            "set pad_token in its tokenizer_config.json, e.g. to a reserved token or to "
            f"{tokenizer.eos_token!r}"
        )
    size = vocabulary_size(config)
    largest = max(tokenizer.get_vocab().values())
    if size is not None and largest >= size:
        raise ConfigError(
            f"the tokenizer of {key} {source!r} has token ids up to {largest}, but the model "
            f"{model.path!r} has a vocabulary of {size}; "
            "use the model's own tokenizer or resize the embeddings"
        )
    return tokenizer
