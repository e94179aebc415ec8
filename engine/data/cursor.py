"""Which row comes next: an endless sequence of row numbers that depends on (seed, epoch) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tandem.engine.core.errors import ConfigError


class Cursor:
    """Every epoch is a permutation of its own of the rows that are used, or their plain order.

    length: rows of the dataset; sys.maxsize for rows without end. dropped: numbers of those that
    are left out.
    """

    def __init__(self, length: int, seed: int, shuffle: bool, dropped: list[int]):
        self.kept = None
        if dropped:
            self.kept = np.setdiff1d(np.arange(length), dropped)
        self.dropped = dropped
        self.length = length - len(dropped)
        self.seed = seed % 2**63
        self.shuffle = shuffle
        self.epoch = 0
        self.index = 0
        self.order: tuple[int, np.ndarray] | None = None  # (epoch, permutation)

    def __getitem__(self, place: int) -> int:
        """The row number at a place among the rows that are used."""
        return place if self.kept is None else int(self.kept[place])

    @property
    def drawn(self) -> int:
        """How many rows were drawn so far, in all epochs."""
        return self.epoch * self.length + self.index

    def next(self) -> int:
        if self.index == self.length:
            self.epoch += 1
            self.index = 0
        self.index += 1
        if not self.shuffle:
            return self[self.index - 1]
        if self.order is None or self.order[0] != self.epoch:
            generator = np.random.default_rng([self.seed, self.epoch])
            self.order = self.epoch, generator.permutation(self.length)
        return self[int(self.order[1][self.index - 1])]

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "index": self.index,
            "rows": self.length,
            "dropped": len(self.dropped),
            "dropped_digest": self.digest(),
        }

    def load_state_dict(self, state: Mapping[str, Any], name: str) -> None:
        if state["rows"] != self.length:
            raise ConfigError(
                f"dataset {name!r} has {self.length} rows, but {state['rows']} when the "
                "checkpoint was written; resume with the same data"
            )
        if state.get("dropped_digest", "") != self.digest():
            raise ConfigError(
                f"dataset {name!r}: {len(self.dropped)} rows are left out as too long, "
                f"but others, {state.get('dropped', 0)}, when the checkpoint was "
                "written; resume with the same data, tokenizer and limits"
            )
        self.epoch = state["epoch"]
        self.index = state["index"]

    def digest(self) -> str:
        """Of the rows that are left out; empty if there are none."""
        if not self.dropped:
            return ""
        numbers = np.array(self.dropped, np.int64).tobytes()
        return hashlib.blake2b(numbers, digest_size=16).hexdigest()
