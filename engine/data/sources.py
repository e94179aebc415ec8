"""Prompts to roll out and expert demonstrations, tokenised, in an order that depends on (seed,
epoch) alone.

Invariants:
  * Nothing is cut, skipped or repaired that the config does not ask for: a row that cannot be used
    is a ConfigError that names it, before the run starts wherever the rows have an end.
  * Two sources with equal arguments and equal `state_dict` go on identically.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tandem.engine.config.schema import DataConfig, DatasetConfig, ModelConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.core.types import Finish, Prompt, Source, Trajectory
from tandem.engine.data.cursor import Cursor
from tandem.engine.data.encoding import Encoder
from tandem.engine.data.lengths import TooLong
from tandem.engine.data.row_ids import row_id
from tandem.engine.data.rows import Rows, open_rows
from tandem.engine.data.samples import Sample, column
from tandem.engine.data.scores import with_scores
from tandem.engine.data.tasks import UNLIMITED, is_generated

TOKENISED_ROWS = 2_000  # rows that are tokenised before the run; of later ones those that need it
UNLIMITED_ROWS = 32  # the same for generated rows without end
BATCH_CHARACTERS = 1_000_000  # of rows whose tokens are counted at once
MOST_DROPPED = 1_000  # rows without end that are too long, one after the other


class RowError(ConfigError):
    """A row that could not be checked before the run is wrong."""


class RowSource:
    """An endless sequence of the rows of a dataset.

    `len` is the rows of one epoch, and `source[i]` the i-th of them.

    evaluation: the rows are those of data.evaluation, which are never trained on.

    Raises ConfigError on construction for anything wrong with the dataset, and from `take` RowError
    for generated rows without end. `dropped` and `truncated` count rows that were too long
    (data.overlong).
    """

    demonstrations = False  # whether every row must have a response

    def __init__(
        self,
        dataset: DatasetConfig,
        data: DataConfig,
        tokenizer,
        model: ModelConfig,
        seed: int,
        evaluation: bool = False,
    ):
        self.dataset = dataset
        self.data = data
        self.encoder = Encoder(self.wanted(dataset), data, tokenizer, model)
        if is_generated(dataset.path):
            refuse_wrong_split(dataset, evaluation)
        self.rows: Rows = open_rows(dataset)
        length = len(self.rows)
        if dataset.limit is not None:
            length = min(length, dataset.limit)
        if length < 1:
            raise ConfigError(f"{dataset.path}: limit is {dataset.limit}, which leaves no rows")
        self.endless = length == UNLIMITED
        if self.endless and (evaluation or self.demonstrations or dataset.scores):
            raise ConfigError(
                f"{dataset.path}: options.size is not set; demonstrations, evaluation and scores "
                "need a fixed number of problems"
            )
        if dataset.scores is not None:
            self.rows = with_scores(self.rows, length, dataset.scores)
        self.dropped = 0
        self.answered_before = 0  # rows with an earlier turn of the assistant's
        self.first_dropped = ""
        left_out = self.check(UNLIMITED_ROWS if self.endless else length)
        if len(left_out) == length:
            raise ConfigError(
                f"{dataset.path}: all {length} rows are too long and left out "
                f"(data.overlong=drop); the first: {self.first_dropped}"
            )
        self.truncated = self.encoder.truncated
        shuffle = data.shuffle and not self.endless  # rows without end come at random anyway
        self.cursor = Cursor(length, seed, shuffle, [] if self.endless else sorted(left_out))

    def wanted(self, dataset: DatasetConfig) -> DatasetConfig:
        """The dataset with the columns that its samples are read from."""
        return dataset

    def samples(self, number: int) -> list[Sample]:
        """What the row of this number holds."""
        return [self.encoder.read(self.rows[number], self.rows.label(number))]

    def check(self, count: int) -> set[int]:
        """Read the first rows, all if they have an end.

        Tokenise the first of them, those that may be too long, and every row that looks like none
        before. Returns the numbers of rows to leave out.
        """
        left_out: set[int] = set()
        doubtful: list[tuple[int, Sample]] = []  # too many characters to tell
        characters = 0
        for number in range(count):
            for sample in self.samples(number):
                self.answered_before += sample.answered_before
                size = sum(map(len, sample.texts))
                large = size > BATCH_CHARACTERS
                if number < TOKENISED_ROWS or large or not self.encoder.knows(sample):
                    self.try_row(number, sample, left_out)
                elif not self.encoder.surely_fits(sample):
                    doubtful.append((number, sample))
                    characters += size
            if characters > BATCH_CHARACTERS:
                self.try_rows(doubtful, left_out)
                doubtful = []
                characters = 0
        self.try_rows(doubtful, left_out)
        return left_out

    def try_rows(self, rows: list[tuple[int, Sample]], left_out: set[int]) -> None:
        fitting = self.encoder.fitting([sample for _, sample in rows]) if rows else []
        for (number, sample), fits in zip(rows, fitting, strict=True):
            if not fits:
                self.try_row(number, sample, left_out)

    def try_row(self, number: int, sample: Sample, left_out: set[int]) -> None:
        try:
            self.encoder.encode(sample, self.rows.label(number))
        except TooLong as error:
            if number not in left_out:
                self.drop(error)
            left_out.add(number)

    def drop(self, error: TooLong) -> None:
        """Count a row that is left out. Raises the error again if the config does not allow it."""
        if self.data.overlong != "drop":
            raise error
        self.dropped += 1
        self.first_dropped = self.first_dropped or str(error)

    def describe(self) -> Iterator[str]:
        """Lines about what the rows hold and the run does not use."""
        parts = []
        if self.dropped:
            parts.append(f"{self.dropped} left out (the first: {self.first_dropped})")
        if self.truncated:
            parts.append(
                f"{self.truncated} prompts cut to their last {self.data.max_prompt_tokens} tokens"
            )
        if parts:
            rows = "the first" if self.endless else f"{self.cursor.length + self.dropped}"
            yield (
                f"{self.dataset.path}: of {rows} rows, {', '.join(parts)} "
                f"(data.overlong={self.data.overlong})"
            )
        in_one_column = self.dataset.response == self.dataset.prompt
        if self.answered_before and in_one_column and self.dataset.train_on == "last":
            yield (
                f"{self.dataset.path}: of {self.answered_before} rows only the last turn of the "
                "assistant's is trained; `train_on: all` of the dataset trains the earlier ones too"
            )

    def facts(self) -> dict[str, Any]:
        """For the events of a run."""
        return {
            "path": self.dataset.path,
            "rows": None if self.endless else len(self),
            "dropped": self.dropped,
            "truncated": self.truncated,
            "template_date": self.encoder.template.clock,
        }

    def __len__(self) -> int:
        return self.cursor.length

    def take(self, n: int) -> list[Any]:
        """The next n rows. If one is wrong, none of them counts as taken."""
        epoch, index = self.cursor.epoch, self.cursor.index
        try:
            return [self.next() for _ in range(n)]
        except ConfigError as error:
            self.cursor.epoch, self.cursor.index = epoch, index
            raise RowError(str(error)) from None

    def next(self) -> Any:
        for _ in range(MOST_DROPPED):
            try:
                return self.make(self.cursor.next())
            except TooLong as error:
                self.drop(error)
        raise ConfigError(
            f"{self.dataset.path}: {MOST_DROPPED} rows in a row are too long; the first: "
            f"{self.first_dropped}"
        )

    def __getitem__(self, place: int) -> Any:
        return self.make(self.cursor[place])

    def make(self, number: int) -> Any:
        """What the row of this number is for the run."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {**self.cursor.state_dict(), "template_date": self.encoder.template.clock}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.cursor.load_state_dict(state, self.dataset.path)
        self.encoder.template.clock = state.get("template_date", self.encoder.template.clock)


class PromptSource(RowSource):
    """Prompts. With `dataset.response` set, each carries the row's demonstration (the response's
    ids).
    """

    def make(self, number: int) -> Prompt:
        row, label = self.rows[number], self.rows.label(number)
        encoded = self.encoder.encode(self.encoder.read(row, label), label)
        return Prompt(row_id(row, label), encoded.tokens, encoded.content, row, encoded.response)


class ExpertSource(RowSource):
    """Demonstrations: trajectories whose response tokens are EXPERT, of a chat those of the trained
    turns.
    """

    demonstrations = True

    def wanted(self, dataset: DatasetConfig) -> DatasetConfig:
        # the name that the column has in generated rows
        return replace(dataset, response=dataset.response or "response")

    def samples(self, number: int) -> list[Sample]:
        self.role(self.rows[number], self.rows.label(number))
        return super().samples(number)

    def make(self, number: int) -> Trajectory:
        row, label = self.rows[number], self.rows.label(number)
        sample = self.encoder.read(row, label)
        return self.trajectory(sample, row, label, self.role(row, label))

    def trajectory(
        self, sample: Sample, row: Mapping[str, Any], label: str, role: str
    ) -> Trajectory:
        encoded = self.encoder.encode(sample, label)
        assert encoded.response is not None  # the reader refuses a row without one
        assert encoded.trained is not None
        source = np.zeros(len(encoded.tokens) + len(encoded.response), np.int8)  # PROMPT
        source[len(encoded.tokens) :][encoded.trained] = Source.EXPERT
        tokens = np.concatenate([encoded.tokens, encoded.response])
        name = row_id(row, label)
        return Trajectory(name, tokens, source, Finish.STOP, columns=row, role=role)

    def role(self, row: Mapping[str, Any], label: str) -> str:
        """What the row says in the column that `role:` of the dataset names; '' without one."""
        name = self.dataset.role
        if name is None:
            return ""
        found = column(row, name, "role", label)
        if not isinstance(found, str) or not found:
            raise ConfigError(f"{label}: column {name!r} is {brief(found)}, expected a word")
        return found


def refuse_wrong_split(dataset: DatasetConfig, evaluation: bool) -> None:
    if evaluation == (dataset.split == "test"):
        return
    use = "evaluation" if evaluation else "training"
    raise ConfigError(
        f"{dataset.path} with split {dataset.split!r} for {use}: generated data needs split: test "
        "in data.evaluation and split: train elsewhere, so that no evaluation problem is trained on"
    )


def recorded_date(cursors: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The date that the templates of a run tell, from the cursors of its checkpoint."""
    for state in cursors.values():
        if "template_date" in state:
            return state["template_date"]
    return None
