"""Types in words, for errors and for the reference of keys."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "nothing",
}


def describe(hint: Any) -> str:
    """What a value of this type is, as it is written in a config."""
    base, args = typing.get_origin(hint), typing.get_args(hint)
    if base in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(describe(kind) for kind in args))
    if base is Literal:
        return f"one of {', '.join(literal(word) for word in args)}"
    if base is tuple:
        entries = f"a list of {describe(args[0])}"
        return entries if Ellipsis in args else f"{entries} with {len(args)} entries"
    if dataclasses.is_dataclass(hint) or dict in (base, hint):
        return "a section"
    return WORDS.get(hint, str(hint))


def literal(value: Any) -> str:
    """As YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def written(value: bool) -> str:
    """As YAML has it."""
    return str(value).lower()
