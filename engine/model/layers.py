"""Where a decoder's layers are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tandem.engine.core.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, first to last: `layers` in most families, `h` in GPT-2's."""
    for child in model.get_decoder().children():
        if isinstance(child, nn.ModuleList):
            return list(child)
    raise ConfigError(
        f"{type(model).__name__} has no list of decoder layers, which this scope.kind chooses "
        "from; use scope.kind=full or lora"
    )
