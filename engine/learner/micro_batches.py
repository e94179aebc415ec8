"""Laying rows out in bins: where each token stands, and the streams of the trained ones.

B bins of length L, n trained tokens, T tokens of a row. Names of arrays end in their shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.algorithms.base import Term
from tandem.engine.core.types import MicroBatch, Row, Source

STREAMS = ("advantage", "behaviour_logp", "old_logp", "ref_logp", "old_value", "returns")


@dataclass(frozen=True)
class Family:
    """Rows behind one copy of their first `prompt` tokens, which are the same in all of them and
    not trained. `rows` are positions in the step's row list.
    """

    prompt: int
    rows: tuple[int, ...]

    def length(self, lengths: Sequence[int]) -> int:
        """Tokens to run, where row i alone has `lengths[i]`."""
        return self.prompt + sum(lengths[i] - self.prompt for i in self.rows)


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
    return [name for name in STREAMS if any(getattr(row, name) is not None for row in rows)]


def build(
    rows: Sequence[Row],
    lengths: Sequence[int],
    bins: Sequence[Sequence[Family]],
    terms: Sequence[Term],
    streams: Sequence[str],
    version: int,
) -> MicroBatch:
    """Lay the first `lengths[i]` tokens of each row out in its bin and gather the streams of the
    trained tokens. No bins: an empty micro-batch.
    """
    bins = bins or [[]]
    layout = lay_out(rows, lengths, bins)
    order = [i for families in bins for family in families for i in family.rows]
    columns = Columns([rows[i] for i in order])
    return MicroBatch(
        tokens=layout.tokens_BL,
        positions=layout.positions_BL,
        index=layout.index_n,
        prompt_blocks=layout.prompt_blocks_2BL if layout.shared else None,
        target=columns.gather([row.tokens for row in columns.rows], np.int64),
        weights={term.name: columns.weights(term) for term in terms},
        scale={term.name: columns.scales(term) for term in terms},
        segment=columns.segments(),
        group=columns.gather([row.group for row in columns.rows], np.int64),
        source=columns.gather([row.source for row in columns.rows], np.int8),
        streams={name: columns.stream(name) for name in streams},
        fresh=columns.fresh(version),
        rows=tuple(order),
        real_tokens=sum(len(row.tokens) for row in columns.rows),
    )


def lay_out(
    rows: Sequence[Row], lengths: Sequence[int], bins: Sequence[Sequence[Family]]
) -> Layout:
    """Give every token of the families its position in a bin.

    The first row of a family brings the prompt with it, the others continue it. `prompt_blocks`
    numbers the blocks: a prompt that is shared is one, and the tail of each row behind it is one.
    """
    shape = (len(bins), max(1, max(used_tokens(families, lengths) for families in bins)))
    width = shape[1]
    tokens_BL = np.zeros(shape, np.int64)
    positions_BL = np.zeros(shape, np.int64)
    prompt_blocks_2BL = np.full((2, *shape), -1, np.int64)
    index = [np.zeros(0, np.int64)]
    shared = False
    block = 0
    for b, families in enumerate(bins):
        start = 0
        for family in families:
            root = block
            prompt_start = b * width + start
            shared = shared or len(family.rows) > 1
            for number, i in enumerate(family.rows):
                first = 0 if number == 0 else family.prompt
                stop = start + lengths[i] - first
                tokens_BL[b, start:stop] = rows[i].tokens[first : lengths[i]]
                positions_BL[b, start:stop] = np.arange(first, lengths[i])
                if len(family.rows) > 1:
                    block += 1
                prompt_blocks_2BL[:, b, start:stop] = [[block], [root]]
                if number == 0:
                    prompt_blocks_2BL[0, b, start : start + family.prompt] = root
                # the hidden states that predict: those one before the trained tokens
                before = rows[i].trained.nonzero()[0] - 1
                in_prompt = before < family.prompt
                own_start = b * width + start - first
                index.append(np.where(in_prompt, prompt_start + before, own_start + before))
                start = stop
            block += 1
        positions_BL[b, start:] = np.arange(width - start)
    return Layout(tokens_BL, positions_BL, prompt_blocks_2BL, np.concatenate(index), shared)


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
            parts.append(np.broadcast_to(value, mask.shape)[mask])
        return np.concatenate(parts).astype(dtype)

    def stream(self, name: str) -> np.ndarray:
        """NaN where a row does not have it."""
        values = [getattr(row, name) for row in self.rows]
        return self.gather([np.nan if value is None else value for value in values], np.float32)

    def weights(self, term: Term) -> np.ndarray:
        """0 in rows that are not in the term."""
        return self.gather([row.weights.get(term.name, 0.0) for row in self.rows], np.float32)

    def scales(self, term: Term) -> np.ndarray:
        """The reduction's factor of each token's row."""
        return self.gather([row_scale(row, term) for row in self.rows], np.float32)

    def segments(self) -> np.ndarray:
        """The number of each token's row."""
        return np.repeat(np.arange(len(self.rows)), self.counts).astype(np.int64)

    def fresh(self, version: int) -> np.ndarray:
        """Whether each token was sampled with the weights of `version`."""
        values = []
        for row in self.rows:
            if row.version is None:
                values.append(False)
            else:
                values.append((row.source == Source.POLICY) & (row.version == version))
        return self.gather(values, bool)


def row_scale(row: Row, term: Term) -> float:
    count = 0
    if term.name in row.weights:
        count = int((row.weights[term.name] != 0).sum())
    if count == 0:
        return 0.0
    return term.reduction.row_scale(count)
