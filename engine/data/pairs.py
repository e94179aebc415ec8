"""Pairs: rows with a better and a worse answer to one prompt, as preference methods want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.core.types import Trajectory
from tandem.engine.data.samples import Sample, SampleReader, column
from tandem.engine.data.sources import ExpertSource

CHOSEN, REJECTED = "chosen", "rejected"  # the roles of the two trajectories


class PairSource(ExpertSource):
    """Every row is two trajectories, of roles "chosen" and "rejected", next to each other. Their
    group is how many pairs were drawn before; only the last turn of a chat is trained.

    `len`, `source[i]`, `take` and the cursor count pairs.
    """

    def wanted(self, dataset: DatasetConfig) -> DatasetConfig:
        return replace(dataset, response=dataset.chosen)

    def pair(self, row: Mapping[str, Any], label: str) -> list[Sample]:
        """The chosen and the rejected answer. Raises ConfigError unless they make a pair."""
        names = {CHOSEN: self.dataset.chosen, REJECTED: self.dataset.rejected}
        for key, name in names.items():
            assert name is not None, "refused by the config's rules"
            column(row, name, key, label)
        chosen = self.encoder.read(row, label)
        rejected = self.rejected.read(row, label)
        if chosen.prompt != rejected.prompt:
            ours, theirs = first_difference(chosen.chat, rejected.chat)
            raise ConfigError(
                f"{label}: {names[CHOSEN]!r} and {names[REJECTED]!r} are chats that begin "
                f"differently, {brief(ours)} and {brief(theirs)}; a pair is two answers to one "
                "prompt: they may differ in their last message alone"
            )
        if chosen.turns == rejected.turns:
            raise ConfigError(
                f"{label}: {names[CHOSEN]!r} and {names[REJECTED]!r} are the same answer, "
                f"{brief(chosen.turn_texts[0])}: nothing to prefer; remove the row"
            )
        return [chosen, rejected]

    @cached_property
    def rejected(self) -> SampleReader:
        """Reads the rejected answer with its prompt."""
        dataset = replace(self.dataset, response=self.dataset.rejected)
        if dataset.prompt == dataset.chosen and dataset.rejected is not None:  # whole chats
            dataset = replace(dataset, prompt=dataset.rejected)
        return self.encoder.reader_of(dataset)

    def samples(self, number: int) -> list[Sample]:
        return self.pair(self.rows[number], self.rows.label(number))

    def make(self, number: int) -> tuple[Trajectory, Trajectory]:
        row, label = self.rows[number], self.rows.label(number)
        chosen, rejected = self.pair(row, label)
        return (
            self.trajectory(chosen, row, label, CHOSEN),
            self.trajectory(rejected, row, label, REJECTED),
        )

    def take(self, n: int) -> list[Trajectory]:
        """The trajectories of the next n pairs."""
        drawn = self.cursor.drawn
        found = []
        for number, pair in enumerate(super().take(n), drawn):
            found.extend(replace(trajectory, group=number) for trajectory in pair)
        return found


def first_difference(ours: list[dict], theirs: list[dict]) -> tuple[Any, Any]:
    """The first message of each that the other has not; None for one that has ended."""
    for place in range(max(len(ours), len(theirs))):
        one = ours[place] if place < len(ours) else None
        other = theirs[place] if place < len(theirs) else None
        if one != other:
            return one, other
    return None, None


def demonstration_source(dataset: DatasetConfig) -> type[ExpertSource]:
    """What reads it."""
    return ExpertSource if dataset.chosen is None else PairSource
