"""Whole rows, and groups of rows, as objectives see them that say one number for each.

A term with `unit="row"` calls its objective with `Units`, one with `unit="group"` with `Groups`. It
returns (loss [m], {metric: [m]}), one number per row or per group. Which rows there are, of which
group and role, is known on the host, so that pairing them makes no GPU wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tandem.algorithms.parts.objectives.tokens import Tokens
from tandem.engine.core.errors import MethodError
from tandem.engine.core.types import MicroBatch

UNITS = ("token", "row", "group")


@dataclass(frozen=True, eq=False)
class Units:
    """The rows of one micro-batch in a term, m of them.

    A sum or mean is over the row's tokens in the term, and NaN if the row has one without a number.
    `units[name]` is a number that the row has on all its tokens alike: that on its first.
    """

    tokens: Tokens  # of the term, row after row; `segment` is the number of the row here
    counts: np.ndarray  # int64 [m]: tokens of each row
    group: np.ndarray  # int64 [m]
    role: tuple[str, ...]  # [m]: Row.role

    def __len__(self) -> int:
        return len(self.counts)

    def __contains__(self, name: str) -> bool:
        return name in self.tokens

    def __getitem__(self, name: str) -> Tensor:
        """[m] of a stream. Raises KeyError if it is absent."""
        return self.tokens[name][self.on_device(self.starts)]

    @property
    def sum_logp(self) -> Tensor:
        """[m]: log-prob of the whole response."""
        return self.total(self.tokens.logp)

    @property
    def mean_logp(self) -> Tensor:
        """[m]: log-prob per token."""
        return self.sum_logp / self.count

    def sum(self, name: str) -> Tensor:
        """[m] of a stream."""
        return self.total(self.tokens[name])

    def mean(self, name: str) -> Tensor:
        """[m] of a stream."""
        return self.sum(name) / self.count

    @property
    def count(self) -> Tensor:
        """float32 [m]: tokens of each row."""
        return self.on_device(self.counts).float()

    def has_role(self, role: str) -> Tensor:
        """bool [m]."""
        return self.on_device(np.array([one == role for one in self.role], bool))

    @property
    def starts(self) -> np.ndarray:
        """int64 [m]: the place of each row's first token, on the host."""
        return np.cumsum(self.counts) - self.counts

    @property
    def unit_of_token(self) -> np.ndarray:
        """int64 [n], on the host."""
        return np.repeat(np.arange(len(self)), self.counts)

    def take(self, rows: np.ndarray) -> Units:
        """The rows `rows` (int64 [k], on the host), in that order."""
        starts, counts = self.starts, self.counts
        places = [np.arange(starts[i], starts[i] + counts[i]) for i in rows]
        index = self.on_device(np.concatenate([np.zeros(0, np.int64), *places]))
        segment = self.on_device(np.repeat(np.arange(len(rows)), self.counts[rows]))
        return Units(
            tokens=self.tokens.take(index).renumbered(segment),
            counts=self.counts[rows],
            group=self.group[rows],
            role=tuple(self.role[i] for i in rows),
        )

    def total(self, values: Tensor) -> Tensor:
        """[n] -> [m]: the sum over each row's tokens."""
        return values.new_zeros(len(self)).index_add(0, self.tokens.segment, values)

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self.tokens.logp.device)


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of one micro-batch in a term, m of them, each with all its rows of the term."""

    rows: Units
    term: str  # for what errors say

    def __len__(self) -> int:
        return len(self.numbers)

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 [m]: the number of each group, rising."""
        return np.unique(self.rows.group)

    @property
    def place(self) -> np.ndarray:
        """int64 [rows]: where the group of each row stands, on the host."""
        return np.searchsorted(self.numbers, self.rows.group)

    @property
    def starts(self) -> np.ndarray:
        """int64 [m]: the place of the first token of each group's first row, on the host."""
        _, first_rows = np.unique(self.rows.group, return_index=True)
        return self.rows.starts[first_rows]

    @property
    def unit_of_token(self) -> np.ndarray:
        """int64 [n], on the host."""
        return np.repeat(self.place, self.rows.counts)

    def of(self, role: str) -> Units:
        """One row of each group, in the order of the groups: that of this role.

        Raises MethodError unless every group has exactly one.
        """
        chosen = np.flatnonzero([one == role for one in self.rows.role])
        of_group = self.rows.group[chosen]
        found = np.bincount(self.place[chosen], minlength=len(self))
        if (found != 1).any():
            wrong = int(np.flatnonzero(found != 1)[0])
            raise MethodError(
                f"term {self.term!r}: group {self.numbers[wrong]} has {found[wrong]} rows of the "
                f"role {role!r} in it, expected 1; set Row.role, and Row.group, in rows()"
            )
        return self.rows.take(chosen[np.argsort(of_group)])

    def sum(self, values: Tensor) -> Tensor:
        """[rows] -> [m]: the sum over each group's rows."""
        return values.new_zeros(len(self)).index_add(0, self.rows.on_device(self.place), values)


def units_of(micro: MicroBatch, in_term: np.ndarray, tokens: Tokens) -> Units:
    """The rows that `tokens` are of, those at `in_term` (int64 [n]) of the micro-batch."""
    numbers, first, segment, counts = np.unique(
        micro.segment[in_term], return_index=True, return_inverse=True, return_counts=True
    )
    return Units(
        tokens=tokens.renumbered(torch.as_tensor(segment, device=tokens.logp.device)),
        counts=counts,
        group=micro.group[in_term][first],
        role=tuple(micro.roles[number] for number in numbers),
    )
