"""Laying rows out in bins: where each token stands, and the streams of the trained ones.

B bins of length L, n trained tokens, T tokens of a row. Names of arrays end in their shape.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from tandem.algorithms.base import Term
from tandem.engine.core.types import Bins, MicroBatch, Row, Source


@dataclass(frozen=True)
class Family:
    """Rows behind one copy of their first `prompt` tokens, which are the same in all of them and
    not trained. `rows` are positions in the step's row list.
    """

    prompt: int
    rows: tuple[int, ...]

    def length(self, lengths: Sequence[int]) -> int:
        """Tokens to run, where row i alone has `lengths[i]`."""
        tails = [lengths[i] - self.prompt for i in self.rows]
        return self.prompt + sum(tails)


BinFamilies: TypeAlias = Sequence[Sequence[Family]]  # the families of each bin


@dataclass
class Layout:
    """Where the tokens of a micro-batch stand; fields as in MicroBatch."""

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    prompt_blocks_2BL: np.ndarray
    index_n: np.ndarray
    shared: bool  # whether two rows stand behind one prompt


def present_streams(rows: Sequence[Row]) -> list[str]:
    """Names of the streams that at least one row has."""
    present: dict[str, None] = {}
    for row in rows:
        present.update(dict.fromkeys(row.streams))
    return list(present)


def build(
    rows: Sequence[Row],
    lengths: Sequence[int],
    bins: BinFamilies,
    terms: Sequence[Term],
    streams: Sequence[str],
    version: int,
    views: Collection[str] = (),
) -> MicroBatch:
    """Lay the first `lengths[i]` tokens of each row out in its bin and gather the streams of the
    trained tokens. No bins: an empty micro-batch.
    """
    bins = bins or [[]]
    layout = lay_out(rows, lengths, bins)
    order: list[int] = []
    for families in bins:
        for family in families:
            order.extend(family.rows)
    placed = [rows[i] for i in order]
    columns = Columns(placed)
    tokens = [row.tokens for row in placed]
    groups = [row.group for row in placed]
    sources = [row.source for row in placed]
    real_tokens = sum(map(len, tokens))
    return MicroBatch(
        tokens=layout.tokens_BL,
        positions=layout.positions_BL,
        index=layout.index_n,
        prompt_blocks=layout.prompt_blocks_2BL if layout.shared else None,
        target=columns.gather(tokens, np.int64),
        weights={term.name: columns.weights(term) for term in terms},
        scale={term.name: columns.scales(term) for term in terms},
        segment=columns.segments(),
        group=columns.gather(groups, np.int64),
        source=columns.gather(sources, np.int8),
        streams={name: columns.stream(name) for name in streams},
        fresh=columns.fresh(version),
        rows=tuple(order),
        real_tokens=real_tokens,
        roles=tuple(row.role for row in placed),
        views={name: lay_out_view(rows, bins, name) for name in views},
    )


def lay_out_view(rows: Sequence[Row], bins: BinFamilies, name: str) -> Bins:
    """The rows of `bins` behind their other prompt, in the same bins and the same order."""
    seen = list(rows)
    lengths = [0] * len(rows)
    alone = []
    for families in bins:
        numbers = [i for family in families for i in family.rows]
        for i in numbers:
            if name in rows[i].views:
                seen[i] = rows[i].at_view(name)
            lengths[i] = tokens_to_run(seen[i])
        alone.append([Family(0, (i,)) for i in numbers])
    layout = lay_out(seen, lengths, alone)
    return Bins(layout.tokens_BL, layout.positions_BL, layout.index_n)


def tokens_to_run(row: Row) -> int:
    """Tokens before the last trained one; 0 if none is trained."""
    trained = row.trained.nonzero()[0]
    return int(trained.max(initial=0))


def lay_out(rows: Sequence[Row], lengths: Sequence[int], bins: BinFamilies) -> Layout:
    """Give every token of the families its position in a bin.

    The first row of a family brings the prompt with it, the others continue it. `prompt_blocks`
    numbers the blocks: a prompt that is shared is one, and the tail of each row behind it is one.
    """
    width = 1
    for families in bins:
        width = max(width, used_tokens(families, lengths))
    tokens_BL = np.zeros((len(bins), width), np.int64)
    positions_BL = np.zeros_like(tokens_BL)
    prompt_blocks_2BL = np.full((2, len(bins), width), -1, np.int64)
    index = [np.zeros(0, np.int64)]
    shared = False
    block = 0
    for b, families in enumerate(bins):
        bin_start = b * width  # of the bin in the flat hidden states
        start = 0
        for family in families:
            root = block
            prompt_start = start
            prompt_stop = start + family.prompt
            several = len(family.rows) > 1
            shared |= several
            first = 0  # of a row's tokens, the first that is its own
            for i in family.rows:
                row = rows[i]
                length = lengths[i]
                stop = start + length - first
                tokens_BL[b, start:stop] = row.tokens[first:length]
                positions_BL[b, start:stop] = np.arange(first, length)
                if several:
                    block += 1
                prompt_blocks_2BL[0, b, start:stop] = block
                prompt_blocks_2BL[1, b, start:stop] = root
                if first == 0:
                    prompt_blocks_2BL[0, b, prompt_start:prompt_stop] = root
                # the hidden states that predict: those one before the trained tokens
                before = row.trained.nonzero()[0] - 1
                in_prompt = before < family.prompt
                row_start = np.where(in_prompt, prompt_start, start - first)
                index.append(bin_start + row_start + before)
                start = stop
                first = family.prompt
            block += 1
        positions_BL[b, start:] = np.arange(width - start)
    index_n = np.concatenate(index)
    return Layout(tokens_BL, positions_BL, prompt_blocks_2BL, index_n, shared)


def used_tokens(families: Sequence[Family], lengths: Sequence[int]) -> int:
    return sum(family.length(lengths) for family in families)


class Columns:
    """The trained tokens of `rows`, row after row, as flat columns [n]."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows
        self.masks = [row.trained for row in rows]
        self.counts = [int(mask.sum()) for mask in self.masks]

    def gather(self, values: Sequence, dtype) -> np.ndarray:
        """One array [T] or number per row -> its values at the trained tokens."""
        parts = [np.zeros(0, dtype)]
        for value, mask in zip(values, self.masks, strict=True):
            per_token = np.broadcast_to(value, mask.shape)
            parts.append(per_token[mask])
        return np.concatenate(parts).astype(dtype)

    def stream(self, name: str) -> np.ndarray:
        """NaN where a row does not have it."""
        values = [row.streams.get(name, np.nan) for row in self.rows]
        return self.gather(values, np.float32)

    def weights(self, term: Term) -> np.ndarray:
        """0 in rows that are not in the term."""
        values = [row.weights.get(term.name, 0.0) for row in self.rows]
        return self.gather(values, np.float32)

    def scales(self, term: Term) -> np.ndarray:
        """The reduction's factor of each token's row."""
        values = [row_scale(row, term) for row in self.rows]
        return self.gather(values, np.float32)

    def segments(self) -> np.ndarray:
        """The number of each token's row."""
        numbers = np.arange(len(self.rows), dtype=np.int64)
        return np.repeat(numbers, self.counts)

    def fresh(self, version: int) -> np.ndarray:
        """Whether each token was sampled with the weights of `version`."""
        values = []
        for row in self.rows:
            if row.version is None:
                values.append(False)
                continue
            sampled = row.source == Source.POLICY
            current = row.version == version
            values.append(sampled & current)
        return self.gather(values, bool)


def row_scale(row: Row, term: Term) -> float:
    if term.name not in row.weights:
        return 0.0
    in_term = row.weights[term.name] != 0
    count = int(in_term.sum())
    if count == 0:
        return 0.0
    if term.unit != "token":
        count = 1  # it has one number
    return term.reduction.row_scale(count)
