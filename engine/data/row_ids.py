"""What a dataset row is called, in rollouts, score files and messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.engine.core.foreign import ID_CHARACTERS, message, text_of


def row_id(row: Mapping[str, Any], label: str) -> str:
    """The row's own id, or its label where it has none, or one that is too long for a name."""
    if row.get("id") is None:
        return message(label)
    name = text_of(row["id"])
    return message(name if len(name) <= ID_CHARACTERS else label)
