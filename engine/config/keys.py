"""What a key of a config is: its type, that type in words, its value."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from tandem.engine.config.schema import Config


def hint_of(keys: tuple) -> Any:
    """The type of the value at these keys; `dict` inside of free options, None if there is no such
    key.
    """
    hint: Any = Config
    for key in keys:
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint).get(key)
        elif typing.get_origin(hint) is tuple:
            hint = typing.get_args(hint)[0]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
        if dict in (hint, typing.get_origin(hint)):
            return dict
    return hint


def describe(hint) -> str:
    base, args = typing.get_origin(hint), typing.get_args(hint)
    if base in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(describe(a) for a in args))
    if base is Literal:
        return f"one of {', '.join(map(literal, args))}"
    if base is tuple:
        return f"a list of {describe(args[0])}" + (
            "" if Ellipsis in args else f" with {len(args)} entries"
        )
    if dataclasses.is_dataclass(hint) or dict in (base, hint):
        return "a section"
    return {
        int: "an integer",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "nothing",
    }.get(hint, str(hint))


def literal(value) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def setting(config: Config, key: str):
    """The value of a dotted key; None below a section that is not set."""
    value = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return value
