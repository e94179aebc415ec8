"""The packer: rows -> micro-batches for every rank.

    rows --balance by cost--> ranks --bins of length L, B bins per micro-batch--> [rank][k] MicroBatch

Invariants:
  * Every row with a trained token is in exactly one micro-batch, whole. Rows without one are left out: they cannot change a gradient.
  * B * L <= micro_batch_tokens, but for a row longer than that, which gets a micro-batch of its own.
  * All ranks get equally many micro-batches (at least one), so that collectives match; the fillers are empty (n = 0).
  * The result depends on the arguments only.
Denominators and row scales do not depend on the packing, so that any packing of the same rows gives the same gradient.

The unit that is placed is a row, or a group where a term has `together`.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tandem.algorithms.base import Term
from tandem.engine.types import MicroBatch, Row, Source

STREAMS = ("advantage", "behaviour_logp", "old_logp", "ref_logp", "old_value", "returns")

# The cost of a micro-batch in units of one token through everything but attention: LAUNCH + B * L * (1 + L / SQUARE).
# Attention over a bin is dense [L, L] with SDPA. Measured on a CPU, hidden 128, 4 layers: 63 us a token in short bins, 346 us in one bin of 4096,
# 4.2 ms for an empty forward and backward. Wider models spend less on both, relative to a token; short bins are then still within a few per cent.
LAUNCH = 64
SQUARE = 1024
FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)     # bin lengths to try, in units of the longest row to be placed


def pack(rows: Sequence[Row], terms: Sequence[Term], ranks: int, micro_batch_tokens: int, version: int) -> tuple[tuple[MicroBatch, ...], ...]:
    """[rank][k] micro-batches for one optimizer step. `version` is the learner's weight version, for `MicroBatch.fresh`."""
    trained, together = [i for i, row in enumerate(rows) if row.trained.any()], any(term.together for term in terms)
    units: dict[tuple, list[int]] = {}
    for i in trained:
        units.setdefault(("group", rows[i].group) if together and rows[i].group >= 0 else ("row", i), []).append(i)
    units = {members[0]: members for members in units.values()}
    lengths = {first: sum(len(rows[i].tokens) for i in members) for first, members in units.items()}
    layouts = [[[[i for first in b for i in units[first]] for b in bins] for bins in layout(share, micro_batch_tokens)] for share in spread(lengths, ranks)]
    steps = max(1, *(len(micros) for micros in layouts))
    present = [name for name in STREAMS if any(getattr(row, name) is not None for row in rows)]
    return tuple(tuple(build(rows, micros[k] if k < len(micros) else [[]], terms, present, version) for k in range(steps)) for micros in layouts)


def spread(lengths: dict[int, int], ranks: int) -> list[dict[int, int]]:
    """Rows (or units of rows) to ranks, longest first to the rank with the least cost so far."""
    shares: list[dict[int, int]] = [{} for _ in range(ranks)]
    loads = [0.0] * ranks
    for i in sorted(lengths, key=lambda i: (-lengths[i], i)):
        rank = loads.index(min(loads))
        shares[rank][i] = lengths[i]
        loads[rank] += cost(1, lengths[i]) - LAUNCH
    return shares


def cost(bins: int, length: int) -> float:
    return LAUNCH + bins * length * (1.0 + length / SQUARE)


def layout(lengths: dict[int, int], budget: int) -> list[list[list[int]]]:
    """[micro-batch][bin][row]: micro-batch after micro-batch, each of the bin length that is cheapest per token of the rows it takes.

    It starts from the longest row still to be placed, so a micro-batch holds rows of similar length and shorter ones in the gaps.
    """
    left = sorted(lengths, key=lambda i: (-lengths[i], i))
    micros = []
    while left:
        longest = lengths[left[0]]
        trials = [fill(left, lengths, max(longest, min(budget, int(longest * factor))), budget) for factor in FACTORS]
        bins, left = min(trials, key=lambda trial: cost_per_token(trial[0], lengths))
        micros.append(bins)
    return micros


def fill(left: list[int], lengths: dict[int, int], capacity: int, budget: int) -> tuple[list[list[int]], list[int]]:
    """(bins, rows that found no place): each row, longest first, into the fullest bin that still takes it, else into a new one."""
    count = max(1, budget // capacity)
    bins, room, rest, widest = [], [], [], 0
    for i in left:
        if lengths[i] <= widest:
            b = min((space, b) for b, space in enumerate(room) if space >= lengths[i])[1]
        elif len(bins) < count:
            b = len(bins)
            bins.append([])
            room.append(capacity)
        else:
            rest.append(i)
            continue
        bins[b].append(i)
        room[b] -= lengths[i]
        widest = max(room)
    return bins, rest


def cost_per_token(bins: list[list[int]], lengths: dict[int, int]) -> float:
    sums = [sum(lengths[i] for i in members) for members in bins]
    return cost(len(bins), max(sums)) / sum(sums)


def build(rows: Sequence[Row], bins: list[list[int]], terms: Sequence[Term], present: Sequence[str], version: int) -> MicroBatch:
    """Lay the rows out in their bins and gather the streams of their trained tokens."""
    order = [i for b in bins for i in b]
    width = max(1, max(sum(len(rows[i].tokens) for i in b) for b in bins))
    tokens, positions = np.zeros((len(bins), width), np.int64), np.zeros((len(bins), width), np.int64)
    masks = [rows[i].trained for i in order]
    offsets = []
    for b, members in enumerate(bins):
        start = 0
        for i in members:
            stop = start + len(rows[i].tokens)
            tokens[b, start:stop] = rows[i].tokens
            positions[b, start:stop] = np.arange(stop - start)
            offsets.append(b * width + start)
            start = stop
        positions[b, start:] = np.arange(width - start)

    def gather(per_row, dtype) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.broadcast_to(per_row(rows[i]), mask.shape)[mask] for i, mask in zip(order, masks))]).astype(dtype)

    def scale(row: Row, term: Term) -> float:
        n = int((row.weights[term.name] != 0).sum()) if term.name in row.weights else 0
        return term.reduction.row_scale(n) if n else 0.0

    missing = np.float32(np.nan)
    flat = np.concatenate([np.zeros(0, np.int64), *(offset + mask.nonzero()[0] for offset, mask in zip(offsets, masks))])
    return MicroBatch(
        tokens=tokens, positions=positions, index=flat - 1, target=tokens.reshape(-1)[flat],
        weights={term.name: gather(lambda row: row.weights.get(term.name, np.float32(0)), np.float32) for term in terms},
        scale={term.name: gather(lambda row: np.float32(scale(row, term)), np.float32) for term in terms},
        segment=np.repeat(np.arange(len(order)), [int(mask.sum()) for mask in masks]).astype(np.int64),
        group=gather(lambda row: np.int64(row.group), np.int64), source=gather(lambda row: row.source, np.int8),
        streams={name: gather(lambda row: missing if getattr(row, name) is None else getattr(row, name), np.float32) for name in present},
        fresh=gather(lambda row: False if row.version is None else (row.source == Source.POLICY) & (row.version == version), bool),
        rows=tuple(order), real_tokens=sum(len(rows[i].tokens) for i in order))
