"""A config's values against the schema: pydantic checks, its errors are told in words of ours."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from tandem.engine.config.keys import hint_of, keys_of, without_none
from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import Reference
from tandem.engine.config.tree import Tree
from tandem.engine.config.words import describe
from tandem.engine.config.yaml_reader import dotted
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest

BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
MAX_SHOWN = 5  # mistakes that one error tells
# {a key of an earlier version: what to write instead}
REMOVED_KEYS = {"run.fake_reward": "write reward.functions=[fake] for random rewards"}


@cache
def adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def validated(values: dict[str, Any], tree: Tree) -> Config:
    """The config of these values, which were read from `tree`. Raises ConfigError."""
    try:
        config = adapter().validate_python(values)
    except ValidationError as error:
        raise ConfigError(error_text(error, tree)) from None
    return with_references(config, values)


def error_text(error: ValidationError, tree: Tree) -> str:
    """A line for each mistake, the first few of them."""
    mistakes = error.errors(include_url=False)
    lines = [mistake_in_words(mistake, tree) for mistake in mistakes[:MAX_SHOWN]]
    if len(mistakes) > MAX_SHOWN:
        lines.append(f"and {len(mistakes) - MAX_SHOWN} more")
    return "\n".join(lines)


def mistake_in_words(mistake: Any, tree: Tree) -> str:
    """One of pydantic's errors: what was found, what was expected, where it was set."""
    path = mistake["loc"]
    value = mistake["input"]
    context = mistake.get("ctx", {})
    if mistake["type"] in ("unexpected_keyword_argument", "invalid_key"):
        return unknown_key(path, tree)
    if mistake["type"] == "missing":  # an entry of a list that is too short
        path = path[:-1]
    hint = hint_of(path)
    if path[-1] == "[key]":  # the name of a section that may have any
        path = path[:-2]
        hint = str
    key = dotted(path)
    where = tree.source(path)
    for name, words in BOUNDS.items():
        if name in context:
            bound = f"{words} {context[name]:g}"
            if hint != without_none(hint):
                bound += ", or null"
            shown = f"{value:g}" if isinstance(value, float) else value
            return f"{key} is {shown}, must be {bound}, set {where}"
    guess = closest(value, choices(hint))
    return f"{key}: found {brief(value)}{guess}, expected {describe(hint)}, set {where}"


def choices(hint: Any) -> tuple:
    """The words of a Literal; none for another type."""
    kind = without_none(hint)
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def unknown_key(path: tuple, tree: Tree) -> str:
    name = ".".join(str(part) for part in path)
    if name in REMOVED_KEYS:
        return f"{name}, set {tree.source(path)}, is no key any more: {REMOVED_KEYS[name]}"
    key = path[-1]
    known = keys_of(without_none(hint_of(path[:-1])))
    candidates = list(known)
    if len(path) == 1:  # perhaps its section was left out
        candidates = below_sections(str(key)) or [*known, "base"]
    return (
        f"unknown key {brief(name)}{closest(key, candidates)}, set {tree.source(path)}; "
        f"known keys here: {', '.join(known)}"
    )


def below_sections(key: str) -> list[str]:
    """The dotted keys of this name, e.g. learner.zero_stage for zero_stage."""
    found = []
    for section, hint in keys_of(Config).items():
        if dataclasses.is_dataclass(hint) and key in keys_of(hint):
            found.append(f"{section}.{key}")
    return found


def with_references(section: Any, values: dict[str, Any]) -> Any:
    """Put the ${NAME} references back, which pydantic turned into plain strings."""
    changes = {}
    for name, value in values.items():
        built = getattr(section, name)
        if dataclasses.is_dataclass(built):
            changes[name] = with_references(built, value)
        elif name == "sources":
            changes[name] = {key: with_references(built[key], value[key]) for key in value}
        elif isinstance(built, tuple):
            changes[name] = tuple(map(keep_reference, value, built))
        else:
            changes[name] = keep_reference(value, built)
    return dataclasses.replace(section, **changes)


def keep_reference(value: Any, built: Any) -> Any:
    """What stood in the file if it is a reference that stayed text, else what was made of it."""
    return value if isinstance(value, Reference) and isinstance(built, str) else built
