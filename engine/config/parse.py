"""A config as a tree of frozen dataclasses, read from YAML with overrides of the command line.

schema.py lists every key. Unknown keys and contradictory values are errors that name the key, what
was found, what was expected and where it was set. Nothing is edited behind the user's back: what
`load` returns is what was written, plus defaults.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml

from tandem.engine.config.config_file import read_tree
from tandem.engine.config.keys import hint_of, without_none
from tandem.engine.config.paths import resolve_paths
from tandem.engine.config.rules import check_rules
from tandem.engine.config.schema import Config
from tandem.engine.config.secrets import REDACTED, find_redacted, hide, resolve
from tandem.engine.config.tree import Tree
from tandem.engine.config.validation import validated
from tandem.engine.config.words import describe
from tandem.engine.config.yaml_reader import dotted, kind
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import LONGEST


def load(path: str | Path, overrides: Iterable[str] = (), redacted: bool = False) -> Config:
    """Read a YAML config with its bases, apply `key.sub=value` overrides, check its keys.

    Raises ConfigError. What only the method can tell is checked by tandem.load.
    """
    return checked(read_tree(path, overrides), redacted)


def checked(tree: Tree, redacted: bool = False) -> Config:
    """The config of a tree, its keys checked and its paths absolute.

    Raises ConfigError, also for a value that was <redacted> when the config was written, unless
    `redacted`: for a config that is only to be looked at.
    """
    check_written(tree)
    values = resolve(tree.values)
    if not redacted:
        check_redacted(values, tree)
    hide(values)  # remembers the secrets in it before anything is logged
    config = resolve_paths(validated(values, tree))
    with tree.told_where():
        check_rules(config)
    return config


def check_written(tree: Tree) -> None:
    """Raise ConfigError where YAML read a number or boolean and text is expected, or may be
    meant.
    """
    for path, text in tree.written.items():
        meant = text_meant(path, text)
        if meant is not None:
            shown = text[:LONGEST]
            raise ConfigError(
                f"{dotted(path)}: found {shown}, which YAML reads as {kind(yaml.safe_load(text))}, "
                f"expected {meant}, set {tree.source(path)}; put text in quotes: '{shown}'"
            )


def text_meant(path: tuple, text: str) -> str | None:
    """What is expected at `path` if that is text, or may be; None otherwise."""
    hint = without_none(hint_of(path))
    words = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
    if hint is str or (words and isinstance(words[0], str)):
        return describe(hint)
    # a method's options have types, and are checked
    if hint is dict and path[0] != "method" and text.lower() in ("yes", "no", "on", "off"):
        return "text, or true or false"
    return None


def check_redacted(values: dict[str, Any], tree: Tree) -> None:
    """Raise ConfigError for a secret that was not written down."""
    path = find_redacted(values)
    if path is not None:
        raise ConfigError(
            f"{dotted(path)}: found {REDACTED}, a secret that was not written down, "
            f"set {tree.source(path)}; give it again, best as "
            "${NAME} with the name of an environment variable"
        )


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict, for the run folder, trackers and --dry-run: `${NAME}` as such, secrets
    redacted.
    """
    return hide(dataclasses.asdict(config))
