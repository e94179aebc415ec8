"""The config: a typed tree of frozen dataclasses, read from YAML with dotted overrides on the
command line.

Every key is listed here, with its meaning and default. Unknown keys and contradictory values are
errors that name the key, what was found, what was expected and where it was set. Nothing is edited
behind the user's back: what `load` returns is what was written, plus defaults.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from tandem.engine.config.config_file import find_config, read_tree
from tandem.engine.config.keys import describe, hint_of
from tandem.engine.config.paths import resolve_paths
from tandem.engine.config.rules import validate
from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import REDACTED, find_redacted, hide, resolve
from tandem.engine.config.yaml_reader import dotted, kind
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import LONGEST, brief, closest


def load(path: str | Path, overrides: list[str] = (), redacted: bool = False) -> Config:
    """Read a YAML config, apply `key.sub=value` overrides, build and validate the tree.

    Paths are made absolute here. Raises ConfigError, also for a value that was <redacted> when the
    config was written, unless `redacted`: for a config that is only to be looked at.
    """
    path = find_config(path)
    tree = read_tree(path, overrides)
    origin = tree.overridden
    check_written(tree.written, str(path), origin)
    values = resolve(tree.values)
    if not redacted and (place := find_redacted(values)) is not None:
        raise ConfigError(
            f"{dotted(place)}: found {REDACTED}, a secret that was not written down, "
            f"set {source(dotted(place), str(path), origin)}; give it again, best as "
            "${NAME} with the name of an environment variable"
        )
    hide(values)  # remembers the secrets in it before anything is logged
    config = resolve_paths(build(Config, values, "", str(path), origin))
    with told_where(path, overrides):
        validate(config)
    return config


@contextmanager
def told_where(path: str | Path, overrides: Iterable[str]) -> Iterator[None]:
    """A ConfigError of the block names the file, and the keys in it that the command line set."""
    try:
        yield
    except ConfigError as error:
        keys = sorted({override.partition("=")[0] for override in overrides})
        named = [key for key in keys if key in str(error)]
        set_there = ""
        if named:
            set_there = f", on the command line {', '.join(named)}"
        raise ConfigError(f"{error} (config {find_config(path)}{set_there})") from error.__cause__


def check_written(written: dict[tuple, str], path: str, origin: set[str]) -> None:
    """Raise ConfigError where YAML read a number or boolean and text is expected, or may be meant."""
    for keys, text in written.items():
        hint = hint_of(keys)
        meant = None
        if hint is str or (
            typing.get_origin(hint) is Literal and type(typing.get_args(hint)[0]) is str
        ):
            meant = describe(hint)
        elif hint is dict and keys[0] != "method" and text.lower() in ("yes", "no", "on", "off"):
            meant = "text, or true or false"  # a method's options have types, and are checked
        if meant is not None:
            key = dotted(keys)
            read_as = kind(yaml.safe_load(text))
            raise ConfigError(
                f"{key}: found {text[:LONGEST]}, which YAML reads as {read_as}, expected {meant}, "
                f"set {source(key, path, origin)}; put text in quotes: '{text[:LONGEST]}'"
            )


# {a key of an earlier version: what to write instead}
GONE = {"run.fake_reward": "write reward.functions=[fake] for random rewards"}


def build(cls: type, tree: dict, prefix: str, path: str, origin: set[str]):
    """A dataclass from a mapping, checking key names and value types all the way down."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix.rstrip('.')}: expected a section (a mapping), found {brief(tree)}, set "
            f"{source(prefix.rstrip('.'), path, origin)}"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        where = source(prefix + str(key), path, origin)
        if key not in hints:
            nested = [
                f"{section}.{key}"
                for section, hint in hints.items()
                if dataclasses.is_dataclass(hint) and key in typing.get_type_hints(hint)
            ]
            if prefix + str(key) in GONE:
                raise ConfigError(
                    f"{prefix}{key}, set {where}, is no key any more: {GONE[prefix + str(key)]}"
                )
            raise ConfigError(
                f"unknown key {brief(prefix + str(key))}{closest(key, nested or hints)}, set "
                f"{where}; known keys here: {', '.join(hints)}"
            )
        values[key] = coerce(hints[key], value, prefix + key, where, path, origin)
    return cls(**values)


def source(key: str, path: str, origin) -> str:
    """Where a key was set: on the command line if it, a key in it, or a section around it was given
    there.
    """
    key = key.partition("[")[0]
    overridden = any(key == o or key.startswith(f"{o}.") or o.startswith(f"{key}.") for o in origin)
    return "on the command line" if overridden else f"in {path}"


def coerce(hint, value, key: str, where: str, path: str, origin):
    """`value` as `hint` wants it, or a ConfigError.

    YAML's `1e-6` is a string to YAML 1.1, so numbers are read from strings too.
    """
    wrong = ConfigError(f"{key}: found {brief(value)}, expected {describe(hint)}, set {where}")
    base, args = typing.get_origin(hint), typing.get_args(hint)
    if base in (types.UnionType, typing.Union):
        if value is None:
            return None
        return coerce(next(a for a in args if a is not type(None)), value, key, where, path, origin)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, key + ".", path, origin)
    if base is Literal:
        if not any(
            value == arg and isinstance(value, bool) == isinstance(arg, bool) for arg in args
        ):
            raise ConfigError(
                f"{key}: found {brief(value)}{closest(value, args)}, expected "
                f"{describe(hint)}, set {where}"
            )
        return value
    if base is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise wrong
        if Ellipsis not in args and len(value) != len(args):
            raise wrong
        return tuple(
            coerce(args[0], v, f"{key}[{i}]", where, path, origin) for i, v in enumerate(value)
        )
    if base is dict:
        if not isinstance(value, dict):
            raise wrong
        return value
    if hint in (int, float):
        if isinstance(value, bool) or value is None:
            raise wrong
        if hint is int and isinstance(value, int) and abs(value) < 1 << 63:
            return value  # float would round a large one
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(number):
            raise wrong
        if hint is float:
            return number
        if not number.is_integer() or abs(number) >= 1 << 63:
            raise wrong
        return int(number)
    if not isinstance(value, hint):
        raise wrong
    return value


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, for the run folder, trackers and --dry-run: `${NAME}` as such, secrets
    redacted.
    """
    return hide(dataclasses.asdict(config))
