"""Half Fine-Tuning (HFT: Half Fine-Tuning for Large Language Models): a random half of the model
trains in each round, the other half stays where it is.

Drawn per round: of the n matrices of each layer's attention, and of its MLP, n // 2; where n is odd
one more in a random half of the layers. So 2 of q, k, v, o; 2 of the 3 MLP matrices in half of the
layers and 1 in the others. A bias goes with its matrix. Half of the layers' norms by the same rule.
Embeddings, output embedding and what else is outside the layers always train.

The paper starts an optimizer anew in each round. Here a round is `every` steps, and what was frozen
goes on with the moments it had. The gradient of the frozen half is computed and thrown away: ranks
with ZeRO count on one for every parameter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tandem.engine.model.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALWAYS = -1  # the unit of what trains in every round
NORMS = "norms"


class Halves:
    """Units of parameters that train or stay together. `chosen` has those that train now."""

    def __init__(self, model: PreTrainedModel, every: int, seed: int):
        self.every, self.seed = every, seed
        # [block][layer]: numbers of its units
        self.blocks: dict[str, list[list[int]]] = {}
        self.unit_of: dict[int, int] = {}  # {id of a parameter: its unit}
        self.round: int | None = None
        self.chosen: set[int] = set()
        count = 0
        for layer in decoder_layers(model):
            in_layer: dict[str, list[int]] = {}
            for block, unit in units_of(layer):
                in_layer.setdefault(block, []).append(count)
                for parameter in unit:
                    self.unit_of[id(parameter)] = count
                    parameter.register_hook(partial(self.masked, count))
                count += 1
            for block, units in in_layer.items():
                self.blocks.setdefault(block, []).append(units)

    def masked(self, unit: int, gradient: Tensor) -> Tensor:
        """A zero gradient for what does not train now."""
        return gradient if unit in self.chosen else torch.zeros_like(gradient)

    def choose(self, step: int) -> set[int]:
        """The units that train at a step of the run: a function of seed and round alone, so that a
        resumed run draws the same.
        """
        number = step // self.every if self.every else 0
        if number != self.round:
            self.round, self.chosen = number, self.draw(number)
        return self.chosen

    def draw(self, number: int) -> set[int]:
        rng = np.random.default_rng([self.seed, number])
        chosen = {ALWAYS}
        for layers in self.blocks.values():
            odd = [place for place, units in enumerate(layers) if len(units) % 2]
            larger = set(rng.permutation(odd)[: len(odd) // 2].tolist())
            for place, units in enumerate(layers):
                size = len(units) // 2 + (place in larger)
                chosen.update(rng.permutation(units)[:size].tolist())
        return chosen


def units_of(layer: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """(block, parameters) of each unit of a decoder layer. The block is the layer's part that it is
    in, such as self_attn; vectors alone are norms.
    """
    stems: dict[str, list[nn.Parameter]] = {}
    for name, parameter in layer.named_parameters():
        stem = re.sub(r"[._]?(weight|bias)$", "", name)
        stems.setdefault(stem, []).append(parameter)
    for stem, parameters in stems.items():
        vectors = all(parameter.dim() < 2 for parameter in parameters)
        yield NORMS if vectors else stem.partition(".")[0], parameters
