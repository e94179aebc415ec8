"""The learner's tensors with the names and the layout of the checkpoint they were loaded from,
which is what a rollout engine loads.

transformers 5 renames some tensors when it loads a model, and holds all experts of a layer in one.
vLLM knows the checkpoint's names only: Mixtral's `block_sparse_moe.experts.0.w1.weight` is part of
`mlp.experts.gate_up_proj` here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

Shape = tuple[str, torch.dtype, tuple[int, ...]]


class CheckpointForm:
    """Made from a transformers model and (name, dtype, full shape) of its parameters; `apply` then
    takes them in the same order, one at a time.

    Where a tensor of the checkpoint is made of several parameters, which one at a time cannot be,
    all keep the names they have.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Shape]):
        self.model = model
        self.converts = False
        self.shapes = list(parameters)
        if not getattr(model, "_weight_conversions", None):
            return
        empty = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, dtype, shape in parameters
        }
        pieces = [
            piece for name, tensor in empty.items() for piece in self.revert({name: tensor}).items()
        ]
        found = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pieces]
        whole = {
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.revert(empty).items()
        }
        if len(found) == len(whole) and set(found) == whole:
            self.converts, self.shapes = True, found

    def revert(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, state)

    def apply(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of `shapes`, in that order.

        Each is valid as long as the parameter it comes from.
        """
        for name, tensor in named:
            if self.converts:
                yield from self.revert({name: tensor}).items()
            else:
                yield name, tensor
