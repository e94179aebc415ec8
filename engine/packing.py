"""The packer: rows -> micro-batches for every rank.

    rows --balance by cost--> ranks --bins of length L, B bins per micro-batch--> [rank][k] MicroBatch

Invariants:
  * Every row with a trained token is in exactly one micro-batch, up to that before its last trained one: nothing is predicted from what comes after.
    Rows without a trained token are left out: they cannot change a gradient.
  * B * L <= micro_batch_tokens, but for a row longer than that, which gets a micro-batch of its own.
  * All ranks get equally many micro-batches (at least one), so that collectives match; the fillers are empty (n = 0).
  * The result depends on the arguments only.
Denominators and row scales do not depend on the packing, so that any packing of the same rows gives the same gradient.

The unit that is placed is a row, a family of rows behind one copy of their prompt, or a whole group where a term has `together`.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


def pack(rows: Sequence[Row], terms: Sequence[Term], ranks: int, micro_batch_tokens: int, version: int,
         share: bool = False) -> tuple[tuple[MicroBatch, ...], ...]:
    """[rank][k] micro-batches for one optimizer step. `version` is the learner's weight version, for `MicroBatch.fresh`.

    With `share`, rows that continue the same prompt stand behind one copy of it (see `MicroBatch.tree`); the policy must support that.
    """
    tokens = [int(row.trained.nonzero()[0].max(initial=0)) for row in rows]     # that have to be run
    trained, together = [i for i, n in enumerate(tokens) if n], any(term.together for term in terms)
    groups: dict[tuple, list[int]] = {}
    for i in trained:
        groups.setdefault(("group", rows[i].group) if together and rows[i].group >= 0 else ("row", i) if together else (), []).append(i)
    found = [families(rows, tokens, members, micro_batch_tokens, share) for members in groups.values()]
    units = {unit[0].rows[0]: unit for unit in (found if together else ([family] for one in found for family in one))}
    lengths = {first: sum(family.length(tokens) for family in unit) for first, unit in units.items()}
    layouts = [[[[family for first in b for family in units[first]] for b in bins] for bins in layout(part, micro_batch_tokens)] for part in spread(lengths, ranks)]
    steps = max(1, *(len(micros) for micros in layouts))
    present = [name for name in STREAMS if any(getattr(row, name) is not None for row in rows)]
    return tuple(tuple(build(rows, tokens, micros[k] if k < len(micros) else [[]], terms, present, version) for k in range(steps)) for micros in layouts)


@dataclass(frozen=True)
class Family:
    """Rows behind one copy of their first `prompt` tokens, which are the same in all of them and not trained."""

    prompt: int
    rows: tuple[int, ...]

    def length(self, tokens: Sequence[int]) -> int:
        return self.prompt + sum(tokens[i] - self.prompt for i in self.rows)


def families(rows: Sequence[Row], tokens: Sequence[int], members: Sequence[int], budget: int, share: bool) -> list[Family]:
    """The members in families. As many rows stay together as is cheapest: each more saves a prompt and makes attention over the bin dearer."""
    if not share:
        return [Family(0, (i,)) for i in members]
    same: dict[tuple, list[int]] = {}
    for i in members:
        prompt = int(rows[i].trained.argmax())
        same.setdefault((prompt, rows[i].tokens[:prompt].tobytes()), []).append(i)
    found = []
    for (prompt, _), mine in same.items():
        tails = {i: tokens[i] - prompt for i in mine}
        mean = sum(tails.values()) / len(mine)
        most = min(range(1, len(mine) + 1), key=lambda k: (prompt + k * mean) * (1 + (prompt + k * mean) / SQUARE) / k)
        portion, length = [], prompt
        for i in mine:
            if portion and (len(portion) == most or length + tails[i] > budget):
                found.append(Family(prompt, tuple(portion)))
                portion, length = [], prompt
            portion.append(i)
            length += tails[i]
        found.append(Family(prompt, tuple(portion)))
    return found


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


def build(rows: Sequence[Row], lengths: Sequence[int], bins: list[list[Family]], terms: Sequence[Term], present: Sequence[str], version: int) -> MicroBatch:
    """Lay the first `lengths[i]` tokens of each row out in their bins and gather the streams of the trained tokens."""
    order = [i for b in bins for family in b for i in family.rows]
    width = max(1, max(sum(family.length(lengths) for family in b) for b in bins))
    tokens, positions = np.zeros((len(bins), width), np.int64), np.zeros((len(bins), width), np.int64)
    tree = np.full((2, len(bins), width), -1, np.int64)
    masks, index, block = [rows[i].trained for i in order], [np.zeros(0, np.int64)], 0
    for b, members in enumerate(bins):
        start = 0
        for family in members:
            trunk, root = b * width + start, block
            for number, i in enumerate(family.rows):
                first = family.prompt if number else 0      # the first row brings the prompt with it
                stop = start + lengths[i] - first
                tokens[b, start:stop] = rows[i].tokens[first:lengths[i]]
                positions[b, start:stop] = np.arange(first, lengths[i])
                if len(family.rows) > 1:
                    block += 1
                tree[:, b, start:stop] = [[block], [root]]
                if number == 0:
                    tree[0, b, start:start + family.prompt] = root
                before = rows[i].trained.nonzero()[0] - 1       # the hidden states that predict
                index.append(np.where(before < family.prompt, trunk + before, b * width + start - first + before))
                start = stop
            block += 1
        positions[b, start:] = np.arange(width - start)

    def gather(per_row, dtype) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.broadcast_to(per_row(rows[i]), mask.shape)[mask] for i, mask in zip(order, masks))]).astype(dtype)

    def scale(row: Row, term: Term) -> float:
        n = int((row.weights[term.name] != 0).sum()) if term.name in row.weights else 0
        return term.reduction.row_scale(n) if n else 0.0

    missing = np.float32(np.nan)
    return MicroBatch(
        tokens=tokens, positions=positions, index=np.concatenate(index), target=gather(lambda row: row.tokens, np.int64),
        tree=tree if any(len(family.rows) > 1 for b in bins for family in b) else None,
        weights={term.name: gather(lambda row: row.weights.get(term.name, np.float32(0)), np.float32) for term in terms},
        scale={term.name: gather(lambda row: np.float32(scale(row, term)), np.float32) for term in terms},
        segment=np.repeat(np.arange(len(order)), [int(mask.sum()) for mask in masks]).astype(np.int64),
        group=gather(lambda row: np.int64(row.group), np.int64), source=gather(lambda row: row.source, np.int8),
        streams={name: gather(lambda row: missing if getattr(row, name) is None else getattr(row, name), np.float32) for name in present},
        fresh=gather(lambda row: False if row.version is None else (row.source == Source.POLICY) & (row.version == version), bool),
        rows=tuple(order), real_tokens=sum(len(rows[i].tokens) for i in order))
