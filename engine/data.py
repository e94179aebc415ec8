"""Prompts to roll out and expert demonstrations, tokenised, in an order that depends on (seed, epoch) alone.

Invariants:
  * Nothing is cut, skipped or repaired: a row that cannot be used is a ConfigError that names it, before the run starts wherever that is affordable.
  * Two sources with equal arguments and equal `state_dict` go on identically.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tandem.engine.config import ConfigError, DataConfig, DatasetConfig, ModelConfig
from tandem.engine.encoding import Encoder
from tandem.engine.foreign import ID_CHARACTERS, message, text_of
from tandem.engine.rows import Rows, open_rows
from tandem.engine.tasks import UNLIMITED, is_generated
from tandem.engine.types import Finish, Prompt, Source, Trajectory

TOKENISED_ROWS = 2_000      # rows that are tokenised before the run, a few seconds; later ones when their turn comes
READ_ROWS = 1_000_000       # rows whose columns are read before the run
UNLIMITED_ROWS = 32         # both, for generated rows without end


class PromptSource:
    """An endless sequence of prompts. `len` is the rows of one epoch.

    With `dataset.response` set, every prompt carries the row's demonstration (the response's token ids).
    Raises ConfigError on construction for anything wrong with the dataset (see `start`), and from `take` for a later row that is too long.
    """

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig, seed: int):
        self.dataset, self.encoder = dataset, Encoder(dataset, data, tokenizer, model)
        self.rows, self.cursor = start(self, dataset, data, seed)

    def __len__(self) -> int:
        return self.cursor.length

    def __getitem__(self, number: int) -> Prompt:
        row, label = self.rows[number], self.rows.label(number)
        prompt = self.encoder.prompt(row, label)
        demonstration = self.encoder.response(row, label, prompt) if self.dataset.response else None
        return Prompt(row_id(row, label), prompt.tokens, prompt.content, row, demonstration)

    def take(self, n: int) -> list[Prompt]:
        return [self[self.cursor.next()] for _ in range(n)]

    def state_dict(self) -> dict[str, int]:
        return self.cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.cursor.load_state_dict(state, self.dataset.path)


class ExpertSource:
    """An endless sequence of demonstrations: trajectories whose response tokens are EXPERT. `len` is the rows of one epoch.

    Raises ConfigError like PromptSource.
    """

    def __init__(self, dataset: DatasetConfig, data: DataConfig, tokenizer, model: ModelConfig, seed: int):
        self.dataset, self.encoder = dataset, Encoder(dataset, data, tokenizer, model)
        self.rows, self.cursor = start(self, dataset, data, seed)

    def __len__(self) -> int:
        return self.cursor.length

    def __getitem__(self, number: int) -> Trajectory:
        row, label = self.rows[number], self.rows.label(number)
        prompt = self.encoder.prompt(row, label)
        response = self.encoder.response(row, label, prompt)
        source = np.repeat(np.array([Source.PROMPT, Source.EXPERT], np.int8), [len(prompt.tokens), len(response)])
        return Trajectory(row_id(row, label), np.concatenate([prompt.tokens, response]), source, Finish.STOP)

    def take(self, n: int) -> list[Trajectory]:
        return [self[self.cursor.next()] for _ in range(n)]

    def state_dict(self) -> dict[str, int]:
        return self.cursor.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.cursor.load_state_dict(state, self.dataset.path)


def start(source: PromptSource | ExpertSource, dataset: DatasetConfig, data: DataConfig, seed: int) -> tuple[Rows, Cursor]:
    """Open and check the rows of a source. Columns are checked in the first READ_ROWS rows, tokens and lengths in the first TOKENISED_ROWS."""
    held_out = dataset is data.evaluation
    if is_generated(dataset.path) and held_out != (dataset.split == "test"):
        raise ConfigError(f"{dataset.path} with split {dataset.split!r} for {'evaluation' if held_out else 'training'}: generated data needs split: test in "
                          "data.evaluation and split: train elsewhere, so that no evaluation problem is trained on")
    source.rows = rows = open_rows(dataset)
    length = len(rows) if dataset.limit is None else min(len(rows), dataset.limit)
    if length < 1:
        raise ConfigError(f"{dataset.path}: limit is {dataset.limit}, which leaves no rows")
    if length == UNLIMITED and (held_out or isinstance(source, ExpertSource)):
        raise ConfigError(f"{dataset.path}: options.size is not set; demonstrations and evaluation need a fixed number of problems")
    for number in range(UNLIMITED_ROWS if length == UNLIMITED else min(length, READ_ROWS)):
        if number < TOKENISED_ROWS:
            source[number]
        else:
            source.encoder.read(rows[number], rows.label(number))
    return rows, Cursor(length, seed, data.shuffle)


class Cursor:
    """Row numbers without end: every epoch is a permutation of its own, or the plain order."""

    def __init__(self, length: int, seed: int, shuffle: bool):
        self.length, self.seed, self.shuffle = length, seed % 2**63, shuffle and length != UNLIMITED    # rows without end come at random anyway
        self.epoch = self.index = 0
        self.order: tuple[int, np.ndarray] | None = None    # (epoch, permutation)

    def next(self) -> int:
        if self.index == self.length:
            self.epoch, self.index = self.epoch + 1, 0
        self.index += 1
        if not self.shuffle:
            return self.index - 1
        if self.order is None or self.order[0] != self.epoch:
            self.order = self.epoch, np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        return int(self.order[1][self.index - 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "rows": self.length}

    def load_state_dict(self, state: Mapping[str, int], name: str) -> None:
        if state["rows"] != self.length:
            raise ConfigError(f"dataset {name!r} has {self.length} rows, but {state['rows']} when the checkpoint was written; resume with the same data")
        self.epoch, self.index = state["epoch"], state["index"]


def row_id(row: Mapping[str, Any], label: str) -> str:
    """The row's own id, or its label where it has none, or one that is too long for a name."""
    if row.get("id") is None:
        return message(label)
    name = text_of(row["id"])
    return message(name if len(name) <= ID_CHARACTERS else label)
