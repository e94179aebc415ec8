"""Columns of dataset rows, as methods read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tandem.engine.core.errors import ConfigError
from tandem.engine.core.numbers import finite_number
from tandem.engine.core.text import brief, closest


def column(columns: Mapping[str, Any], name: str, prompt_id: str) -> Any:
    """What a row has in a column. Raises ConfigError with those that it has."""
    if name not in columns:
        raise ConfigError(
            f"the row of prompt {prompt_id!r} has no column {name!r}{closest(name, columns)}; its "
            f"columns: {', '.join(columns) or 'none'}"
        )
    return columns[name]


def column_number(
    columns: Mapping[str, Any], name: str, prompt_id: str, low: float, high: float
) -> float:
    """The number that a row has in a column. Raises ConfigError for any other value."""
    found = column(columns, name, prompt_id)
    number = finite_number(found)
    if number is None or not low <= number <= high:
        raise ConfigError(
            f"{prompt_id}: column {name!r} is {brief(found)}, expected a number from {low:g} to "
            f"{high:g}"
        )
    return number
