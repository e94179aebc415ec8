"""MuPaS: SFT on dialogues of several speakers, one role at a time.

    L = - TOK{ log p_t : t in an utterance of the row's role }

A dialogue is a chat: the scene as system message, every utterance a turn of the assistant that
begins with the speaker's name ("ANN: hello"), so that who speaks next is learned as ordinary
tokens; `train_on: all`. Each role makes a copy of the dialogue in which only its own utterances are
trained. The column `speakers` names who says each turn; a row without it is of one role (`role:`),
and a row with neither is an error, as is a first step without a word of `roles`.

With all roles and the token mean this is SFT on every utterance. Copies matter for some `roles`,
and where rows weigh alike: with `demos: {reduction: seq_mean_token_mean}` all roles do.

Source: arXiv 2412.05342, read through notes. UNVERIFIED: its reduction, and its two ways to train a
simulator of dialogues, not built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tandem.algorithms.base import Batch
from tandem.algorithms.rows import expert_row, turn_of_token
from tandem.algorithms.sft.sft import SFT
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief
from tandem.engine.core.types import Trajectory


@dataclass
class MuPaS(SFT):
    title: ClassVar[str] = "SFT on dialogues of several speakers, a copy for each role"
    paper: ClassVar[str] = "2412.05342"

    speakers: str = "speakers"  # a column
    roles: tuple[str, ...] = ()  # those that are trained; none given: all

    def rows(self, batch: Batch):
        rows = []
        heard: set[str] = set()
        for dialogue in batch.experts:
            masks = role_masks(dialogue, self.speakers)
            heard.update(masks)
            for role, mask in masks.items():
                if not self.roles or role in self.roles:
                    row = expert_row(dialogue, "sft").with_term("sft", mask)
                    rows.append(self.demos.with_bonus(row, "sft"))
        if heard and not rows and batch.step == 0:
            raise ConfigError(
                f"method.roles is {', '.join(self.roles)}, but none of them says anything in the "
                f"{len(batch.experts)} dialogues of the first step; the roles there: "
                f"{', '.join(sorted(heard))}"
            )
        return rows


def role_masks(dialogue: Trajectory, column: str) -> dict[str, np.ndarray]:
    """{role: float32 [T], 1 on the tokens of its utterances}."""
    turns = turn_of_token(dialogue)
    names = speakers_of(dialogue, column, turns.max() + 1)
    said = {role: [i for i, name in enumerate(names) if name == role] for role in names}
    return {role: np.isin(turns, numbers).astype(np.float32) for role, numbers in said.items()}


def speakers_of(dialogue: Trajectory, column: str, turns: int) -> list[str]:
    """Who says each turn. Raises ConfigError for a row that does not tell."""
    found, row = dialogue.columns.get(column), dialogue.prompt_id
    if not found and dialogue.role:
        return [dialogue.role] * turns
    if not found:
        raise ConfigError(
            f"{row}: no column {column!r} says who speaks, and the row has no role; its columns: "
            f"{', '.join(dialogue.columns) or 'none'}. Set method.speakers to the right one, or "
            "`role` of the dataset"
        )
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"{row}: column {column!r} is {brief(found)}, expected a list of names")
    if len(found) != turns:
        raise ConfigError(
            f"{row}: column {column!r} names {len(found)} speakers, expected one for each of the "
            f"{turns} trained turns of the assistant; is `train_on: all` set?"
        )
    return found
