"""Which parameters of the policy train: all, LoRA adapters, chosen layers, or a random half.

A pattern names a part of the model by any run of the dotted parts of its name, with the wildcards
of a shell: `q_proj`, `layers.0.mlp`, `layers.1?`. What does not train has requires_grad false and
is in no optimizer, but for the random half, which engine/model/halves.py holds still.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import nn

from tandem.engine.config.schema import Config
from tandem.engine.config.scope import ScopeConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.model.adapters import add_adapters, is_linear
from tandem.engine.model.halves import Halves
from tandem.engine.model.layers import decoder_layers
from tandem.engine.model.policy import Policy
from tandem.engine.model.resolve import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANGE = re.compile(r"(\d+)(?:-(\d+))?")  # of decoder layers, both ends included
MAX_SHOWN = 20  # parts of names that an error lists


def apply_scope(policy: Policy, scope: ScopeConfig, seed: int) -> None:
    """Leave to training what the scope names. Raises ConfigError where it names nothing."""
    model = policy.model
    if scope.kind == "lora":
        policy.adapters = add_adapters(model, target_layers(model, scope.targets), scope, seed)
    if scope.kind == "layers":
        chosen = {id(parameter) for parameter in chosen_parameters(model, scope.train)}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    if scope.kind == "random_half":
        policy.halves = Halves(model, scope.every, seed)


def check_scope(config: Config, path: str) -> int | None:
    """How many numbers of the model at `path` train; None: all.

    Raises ConfigError as `apply_scope` does, without loading a weight.
    """
    scope = config.scope
    if scope.kind == "full":
        return None
    model = skeleton(config, path)
    if scope.kind == "random_half":
        Halves(model, scope.every, config.run.seed)
        return None
    if scope.kind == "layers":
        return sum(parameter.numel() for parameter in chosen_parameters(model, scope.train))
    count = 0
    for name in target_layers(model, scope.targets):
        weight = model.get_parameter(f"{name}.weight")
        count += scope.rank * sum(weight.shape)
    return count


def skeleton(config: Config, path: str) -> PreTrainedModel:
    """The model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            read_config(config.model, path), trust_remote_code=config.model.trust_remote_code
        )


def target_layers(model: PreTrainedModel, patterns: Sequence[str]) -> list[str]:
    """Names of the decoder's linear layers that one of the patterns matches; all without one.

    The output embedding is none of them: the chunked head reads its weight itself.
    """
    inside = set(model.get_decoder().modules()) - {model.get_output_embeddings()}
    linear = []
    for name, module in model.named_modules():
        if is_linear(module) and module in inside:
            linear.append(name)
    if not patterns:
        return linear
    found = set()
    for pattern in patterns:
        matching = [name for name in linear if matches(name, pattern)]
        if not matching:
            raise no_match("scope.targets", pattern, "linear layer of the decoder", linear)
        found.update(matching)
    return [name for name in linear if name in found]


def chosen_parameters(model: PreTrainedModel, entries: Sequence[str]) -> list[nn.Parameter]:
    """The parameters in the ranges of layers, and those with a name, that `entries` say.

    Tied weights go by each of their names.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    found: dict[int, nn.Parameter] = {}
    for entry in entries:
        parameters = layer_range(model, entry)
        if parameters is None:
            parameters = [parameter for name, parameter in named if matches(name, entry)]
        if not parameters:
            raise no_match("scope.train", entry, "parameter", [name for name, _ in named])
        found |= {id(parameter): parameter for parameter in parameters}
    return list(found.values())


def layer_range(model: PreTrainedModel, entry: str) -> list[nn.Parameter] | None:
    """The parameters of decoder layers `3` or `3-5`; None for what is no range."""
    match = RANGE.fullmatch(entry)
    if match is None:
        return None
    first = int(match[1])
    last = int(match[2] or first)
    layers = decoder_layers(model)
    if not first <= last < len(layers):
        raise ConfigError(
            f"scope.train has the layers {entry!r}, but the model has layers 0-{len(layers) - 1}; "
            "write FIRST-LAST within them, or a pattern of names"
        )
    found = []
    for layer in layers[first : last + 1]:
        found.extend(layer.parameters())
    return found


def matches(name: str, pattern: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def no_match(key: str, pattern: str, what: str, names: Iterable[str]) -> ConfigError:
    parts: dict[str, None] = {}
    for name in names:
        parts |= dict.fromkeys(part for part in name.split(".") if not part.isdigit())
    last = pattern.rpartition(".")[2]
    near = difflib.get_close_matches(last, parts, n=3, cutoff=0.6)
    words = f"did you mean {', '.join(near)}?" if near else f"names have {', '.join(some(parts))}"
    return ConfigError(f"{key} has {pattern!r}, which no {what} of the model matches; {words}")


def some(parts: Iterable[str]) -> list[str]:
    """The first of them."""
    return list(parts)[:MAX_SHOWN]
