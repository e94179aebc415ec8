"""What stands at a key of a config: its type, and the keys below it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from tandem.engine.config.schema import Config


def keys_of(section: Any) -> dict[str, Any]:
    """{key: its type} of a section's class, without bounds."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def hint_of(path: tuple) -> Any:
    """The type of the value at these keys; `dict` inside of free options, None if there is no such
    key.
    """
    hint: Any = Config
    for key in path:
        section = without_none(hint)
        if dataclasses.is_dataclass(section):
            hint = keys_of(section).get(key)
        elif typing.get_origin(section) is tuple:
            hint = typing.get_args(section)[0]
        elif typing.get_origin(section) is dict:  # sections by name
            hint = typing.get_args(section)[1]
        else:
            return None
        if is_free(hint):
            return dict
    return hint


def is_free(hint: Any) -> bool:
    """Whether it is a section of options that the schema does not know."""
    return typing.get_origin(hint) is dict and typing.get_args(hint)[1] is Any


def without_none(hint: Any) -> Any:
    """The type of a key that is set: `X` for `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint
