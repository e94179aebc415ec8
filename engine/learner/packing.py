"""The packer: rows -> micro-batches for every rank.

    rows -> units -> ranks, balanced by cost -> bins of length L, B bins per micro-batch

Invariants:
  * Every row with a trained token is in exactly one micro-batch, up to that before its last trained
    one: nothing is predicted from what comes after. Rows without a trained token are left out: they
    cannot change a gradient.
  * B * L <= micro_batch_tokens, but for a row longer than that, which gets a micro-batch of its
    own.
  * All ranks get equally many micro-batches (at least one), so that collectives match; the fillers
    are empty (n = 0).
  * The result depends on the arguments only.
Denominators and row scales do not depend on the packing, so that any packing of the same rows gives
the same gradient.

This file decides which rows stand where; micro_batches.py lays them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.algorithms.base import Term, views_of
from tandem.engine.core.types import MicroBatch, Row
from tandem.engine.learner.micro_batches import Family, build, present_streams, tokens_to_run

# The cost of a micro-batch in units of one token through everything but attention:
# LAUNCH + B * L * (1 + L / SQUARE). Attention over a bin is dense [L, L] with SDPA. Measured on a
# CPU, hidden 128, 4 layers: 63 us a token in short bins, 346 us in one bin of 4096, 4.2 ms for an
# empty forward and backward. Wider models spend less on both, relative to a token; short bins are
# then still within a few per cent.
LAUNCH = 64
SQUARE = 1024
# bin lengths to try, in units of the longest row to be placed
FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0)


@dataclass(frozen=True)
class Unit:
    """What is placed as a whole: one family of rows, or all families of a group where a term has
    `together`. `length` is the number of tokens that are run for it.
    """

    families: tuple[Family, ...]
    length: int

    @property
    def first_row(self) -> int:
        return self.families[0].rows[0]


Bin = list[Unit]


def pack(
    rows: Sequence[Row],
    terms: Sequence[Term],
    ranks: int,
    micro_batch_tokens: int,
    version: int,
    share_prompts: bool = False,
) -> tuple[tuple[MicroBatch, ...], ...]:
    """[rank][k] micro-batches for one optimizer step.

    `version` is the learner's weight version, for `MicroBatch.fresh`. With `share_prompts`, rows
    that continue the same prompt stand behind one copy of it (see `MicroBatch.prompt_blocks`); the
    policy must support that.
    """
    lengths = [tokens_to_run(row) for row in rows]
    units = make_units(rows, lengths, terms, micro_batch_tokens, share_prompts)
    arranged = []
    steps = 1
    for part in assign(units, ranks):
        of_rank = arrange(part, micro_batch_tokens)
        arranged.append(of_rank)
        steps = max(steps, len(of_rank))
    streams = present_streams(rows)
    views = views_of(terms)
    packed = []
    for of_rank in arranged:
        built = []
        for bins in of_rank:
            families = [families_of(bin_) for bin_ in bins]
            micro = build(rows, lengths, families, terms, streams, version, views)
            built.append(micro)
        while len(built) < steps:
            filler = build(rows, lengths, [], terms, streams, version, views)
            built.append(filler)
        packed.append(tuple(built))
    return tuple(packed)


def families_of(bin_: Bin) -> list[Family]:
    families: list[Family] = []
    for unit in bin_:
        families.extend(unit.families)
    return families


# -- units


def make_units(
    rows: Sequence[Row],
    lengths: Sequence[int],
    terms: Sequence[Term],
    budget: int,
    share_prompts: bool,
) -> list[Unit]:
    """What is placed: families of rows, or whole groups if a term needs its group together."""

    def unit(families: Sequence[Family]) -> Unit:
        length = sum(family.length(lengths) for family in families)
        return Unit(tuple(families), length)

    trained = [i for i, length in enumerate(lengths) if length]
    if not any(term.together for term in terms):
        families = make_families(rows, lengths, trained, budget, share_prompts)
        return [unit([family]) for family in families]
    groups: dict[tuple[str, int], list[int]] = {}
    for i in trained:
        key = ("group", rows[i].group)
        if rows[i].group < 0:  # in no group
            key = ("row", i)
        groups.setdefault(key, []).append(i)
    units = []
    for members in groups.values():
        families = make_families(rows, lengths, members, budget, share_prompts)
        units.append(unit(families))
    return units


def make_families(
    rows: Sequence[Row],
    lengths: Sequence[int],
    members: Sequence[int],
    budget: int,
    share_prompts: bool,
) -> list[Family]:
    """The members, those that continue the same prompt behind one copy of it."""
    if not share_prompts:
        return [Family(0, (i,)) for i in members]
    same_prompt: dict[tuple[int, bytes], list[int]] = {}
    for i in members:
        row = rows[i]
        prompt = int(row.trained.argmax())
        prompt_ids = row.tokens[:prompt].tobytes()
        same_prompt.setdefault((prompt, prompt_ids), []).append(i)
    found = []
    for (prompt, _), mine in same_prompt.items():
        found += split_family(prompt, mine, lengths, budget)
    return found


def split_family(
    prompt: int, members: Sequence[int], lengths: Sequence[int], budget: int
) -> list[Family]:
    """Families of at most `cheapest_size` rows that fit into `budget` tokens."""
    tails = {i: lengths[i] - prompt for i in members}
    mean_tail = sum(tails.values()) / len(members)
    most = cheapest_size(prompt, mean_tail, len(members))
    found = []
    portion: list[int] = []
    length = prompt
    for i in members:
        full = len(portion) == most or length + tails[i] > budget
        if portion and full:
            found.append(Family(prompt, tuple(portion)))
            portion = []
            length = prompt
        portion.append(i)
        length += tails[i]
    found.append(Family(prompt, tuple(portion)))
    return found


def cheapest_size(prompt: int, mean_tail: float, most: int) -> int:
    """How many rows to put behind one prompt: each more saves a prompt, and makes attention over
    the bin more expensive.
    """

    def cost_per_row(size: int) -> float:
        length = prompt + size * mean_tail
        return length * (1 + length / SQUARE) / size

    return min(range(1, most + 1), key=cost_per_row)


# -- ranks and bins


def cost(bins: int, length: int) -> float:
    """Of a micro-batch of `bins` bins of `length` tokens."""
    return LAUNCH + bins * length * (1.0 + length / SQUARE)


def longest_first(units: Sequence[Unit]) -> list[Unit]:
    return sorted(units, key=lambda unit: (-unit.length, unit.first_row))


def assign(units: Sequence[Unit], ranks: int) -> list[list[Unit]]:
    """Units to ranks, longest first to the rank with the least cost so far."""
    parts: list[list[Unit]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for unit in longest_first(units):
        rank = loads.index(min(loads))
        parts[rank].append(unit)
        loads[rank] += cost(1, unit.length) - LAUNCH
    return parts


def arrange(units: Sequence[Unit], budget: int) -> list[list[Bin]]:
    """[micro-batch][bin] of one rank: micro-batch after micro-batch, each of the bin length that is
    cheapest per token of the units it takes.

    It starts from the longest unit still to be placed, so a micro-batch holds units of similar
    length and shorter ones in the gaps.
    """
    left = longest_first(units)
    micro_batches = []
    while left:
        longest = left[0].length
        trials = []
        for factor in FACTORS:
            within_budget = min(budget, int(longest * factor))
            capacity = max(longest, within_budget)
            trials.append(fill(left, capacity, budget))
        best = min(trials, key=cost_per_token)
        micro_batches.append(best.bins)
        left = best.rest
    return micro_batches


@dataclass(frozen=True)
class Filling:
    bins: list[Bin]
    rest: list[Unit]  # found no place


def fill(units: Sequence[Unit], capacity: int, budget: int) -> Filling:
    """Each unit, longest first, into the fullest bin that still takes it, else into a new one."""
    most_bins = max(1, budget // capacity)
    bins: list[Bin] = []
    space: list[int] = []  # left in each bin
    rest = []
    widest = 0
    for unit in units:
        if unit.length <= widest:
            fitting = [b for b, left in enumerate(space) if left >= unit.length]
            number = min(fitting, key=space.__getitem__)
        elif len(bins) < most_bins:
            number = len(bins)
            bins.append([])
            space.append(capacity)
        else:
            rest.append(unit)
            continue
        bins[number].append(unit)
        space[number] -= unit.length
        widest = max(space)
    return Filling(bins, rest)


def cost_per_token(filling: Filling) -> float:
    used = []
    for bin_ in filling.bins:
        used.append(sum(unit.length for unit in bin_))
    total = cost(len(used), max(used))
    return total / sum(used)
