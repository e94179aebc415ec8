"""The learner's tensors with the names and the layout of the checkpoint they were loaded from,
which is what a rollout engine loads.

transformers 5 renames some tensors when it loads a model, and holds all experts of a layer in one.
vLLM knows the checkpoint's names only: Mixtral's `block_sparse_moe.experts.0.w1.weight` is part of
`mlp.experts.gate_up_proj` here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[str, torch.dtype, tuple[int, ...]]


class CheckpointForm:
    """Made from a transformers model and (name, dtype, full shape) of its parameters; `apply` then
    takes them in the same order, one at a time.

    Where a tensor of the checkpoint is made of several parameters, which one at a time cannot be,
    all keep the names they have.
    """

    def __init__(self, model: PreTrainedModel, parameters: Sequence[Shape]):
        self.model = model
        self.converts = False
        self.shapes = list(parameters)
        if not getattr(model, "_weight_conversions", None):
            return
        empty = {}
        one_by_one: list[Shape] = []
        for name, dtype, shape in parameters:
            empty[name] = torch.empty(shape, dtype=dtype, device="meta")
            one_by_one += shapes_of(self.revert({name: empty[name]}))
        at_once = shapes_of(self.revert(empty))
        if len(one_by_one) == len(at_once) and set(one_by_one) == set(at_once):
            self.converts = True
            self.shapes = one_by_one

    def revert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, state)

    def apply(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `shapes`, in that order.

        Each is valid as long as the parameter it comes from.
        """
        for name, tensor in named:
            if self.converts:
                yield from self.revert({name: tensor}).items()
            else:
                yield name, tensor


def shapes_of(state: dict[str, Tensor]) -> list[Shape]:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()]
