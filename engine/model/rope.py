"""Rope kinds whose frequencies depend on the length of the row: each packed row gets its own.

Transformers picks the factors of `longrope` and the base of `dynamic` ropes by the largest position
in the whole forward. In a pack a row would then change with its neighbours, and the loss with
learner.micro_batch_tokens. `RowRope` asks the model's own rope once for each kind of row instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RowRope(nn.Module):
    """In the place of `rope`, a rotary embedding of transformers of kind `longrope` or `dynamic`.

    `always_long`: the factors of long rows for all rows (longrope only). vLLM does so once its
    max_model_len is beyond the switch, because its cache must not change while a row grows.
    """

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope: Any = rope  # its attributes are those of transformers
        self.always_long = False
        self.switch = switch_length(rope)

    def forward(self, x: Tensor, position_ids: Tensor):
        """cos and sin [B, L, head size] at position_ids int64 [B, L], each row as if alone."""
        if self.always_long:
            return self.ask(x, position_ids, self.switch + 1)
        lengths = row_lengths(position_ids)
        lengths = lengths.clamp(min=self.switch)
        if self.rope.rope_type == "longrope":
            # one set of factors for all long rows
            lengths = lengths.clamp(max=self.switch + 1)
        cos = None
        sin = None
        for length in lengths.unique().tolist():
            mine = lengths == length
            own_positions = position_ids.where(mine, 0)
            own_cos, own_sin = self.ask(x, own_positions, length)
            if cos is None:
                cos = own_cos
                sin = own_sin
            else:
                mask = mine[..., None]
                cos = own_cos.where(mask, cos)
                sin = own_sin.where(mask, sin)
        return cos, sin

    def ask(self, x: Tensor, position_ids: Tensor, length: int):
        """cos and sin of the rope for rows of `length` tokens: it looks at the largest position."""
        rope = self.rope
        rope.inv_freq = rope.original_inv_freq.to(x.device)
        rope.max_seq_len_cached = rope.original_max_seq_len  # forget the rows of earlier calls
        shape = (len(position_ids), 1)
        last = position_ids.new_full(shape, length - 1)
        with_last = torch.cat([position_ids, last], dim=1)
        cos, sin = rope(x, with_last)
        return cos[:, :-1], sin[:, :-1]


def switch_length(rope: Any) -> int:
    """The largest number of tokens of a row that has the frequencies the model was first trained
    with.
    """
    settings = rope.config.rope_parameters
    if rope.rope_type == "longrope":
        return settings["original_max_position_embeddings"]
    return rope.original_max_seq_len


def row_lengths(position_ids: Tensor) -> Tensor:
    """int64 [B, L] -> int64 [B, L]: the largest position plus one of the packed row each token is
    in.

    A new row begins where a position does not follow the one before, which is also how transformers
    tells packed rows apart.
    """
    bins, tokens = position_ids.shape
    begins = torch.ones_like(position_ids)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    row = begins.cumsum(dim=1)  # its number in the bin, from 1 on
    longest = position_ids.new_zeros(bins, tokens + 1)
    longest.scatter_reduce_(1, row, position_ids + 1, "amax")
    return longest.gather(1, row)


def separate_rows(model: nn.Module) -> None:
    """Put a `RowRope` in the place of every rope whose frequencies depend on the length."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = getattr(child, "rope_type", None)
            if not isinstance(kind, str):
                continue
            if kind == "longrope" or "dynamic" in kind:
                setattr(parent, name, RowRope(child))


def row_ropes(model: nn.Module) -> list[RowRope]:
    return [module for module in model.modules() if isinstance(module, RowRope)]


def follow_engines(model: nn.Module, longest: int) -> None:
    """Long factors for all rows where vLLM, started for rows of up to `longest` tokens, has them.

    In-process engines do the same: the keys of a row that grows over the switch could not be
    changed any more.
    """
    for rope in row_ropes(model):
        if rope.rope.rope_type == "longrope":
            rope.always_long = longest > rope.switch
