"""The values of a config before they are checked, and where each of them was set: files laid over
one another, and overrides of the command line on top.

Nothing is known here of the keys themselves; parse.py has them checked.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tandem.engine.config.yaml_reader import MAX_DEPTH, Document, YamlError, dotted, read
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief

UTF8 = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
COMMAND_LINE = "on the command line"


@dataclass
class Tree:
    """What files and overrides say together.

    `written` has the text of numbers and booleans that stood without quotes, by their path.
    `origin` says where a value was set, by its path or that of a section around it.
    """

    file: Path
    values: dict[str, Any] = field(default_factory=dict)
    written: dict[tuple, str] = field(default_factory=dict)
    origin: dict[tuple, str] = field(default_factory=dict)

    def lay(self, document: Document, file: Path) -> None:
        """Lay a file over what is there: sections merge, anything else replaces, null too."""
        self.merge(self.values, document.value, (), f"in {file}")
        self.written |= document.written

    def merge(self, under: dict, over: dict, path: tuple, origin: str) -> None:
        for key, value in over.items():
            place = (*path, key)
            if merges(place, under.get(key), value):
                self.merge(under[key], value, place, origin)
            else:
                under[key] = value
                self.mark(place, origin)

    def mark(self, path: tuple, origin: str) -> None:
        """The value at `path` is new: what was known of it and of values below is forgotten."""
        for known in (self.written, self.origin):
            for other in [other for other in known if other[: len(path)] == path]:
                del known[other]
        self.origin[path] = origin

    def put(self, override: str) -> None:
        """Set `key.sub=value`. Raises ConfigError."""
        path, given = read_override(override)
        node = self.values
        for depth, part in enumerate(path[:-1], 1):
            if node.get(part) is None:
                node[part] = {}
                self.mark(path[:depth], COMMAND_LINE)
            node = node[part]
            if not isinstance(node, dict):
                raise ConfigError(
                    f"override {brief(override)}: {part!r} is a value in {self.file}, not a section"
                )
        node[path[-1]] = given.value
        self.mark(path, COMMAND_LINE)
        for below, words in given.written.items():
            self.written[(*path, *below)] = words

    def source(self, path: tuple) -> str:
        """Where the value at `path` was set, in words."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origin:
                return self.origin[path[:length]]
        return f"in {self.file}"

    @contextmanager
    def told_where(self, section: str = "") -> Iterator[None]:
        """A ConfigError of the block names the file, and what of it was set elsewhere: the keys
        that it names or, if it names none of them, all of `section`.
        """
        try:
            yield
        except ConfigError as error:
            elsewhere = self.elsewhere(str(error)) or self.elsewhere("", section)
            places = "".join(f", {place}" for place in elsewhere)
            raise ConfigError(f"{error} (config {self.file}{places})") from error.__cause__

    def elsewhere(self, text: str, section: str = "") -> list[str]:
        """'on the command line KEYS', 'in BASE KEYS' for keys in `text`, or of `section`, that
        other places set.
        """
        found: dict[str, list[str]] = {}
        for path in leaves(self.values):
            key, origin = dotted(path), self.source(path)
            meant = is_named(key, text) or path[0] == section
            if origin != f"in {self.file}" and meant:
                found.setdefault(origin, []).append(key)
        return [f"{origin} {', '.join(sorted(keys))}" for origin, keys in sorted(found.items())]


def merges(place: tuple, under: Any, over: Any) -> bool:
    """Whether two values are sections that become one. Another method takes no options of the
    first.
    """
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return False
    return place != ("method",) or over.get("name", under.get("name")) == under.get("name")


def leaves(values: dict, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values that are no sections."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


def is_named(key: str, text: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", text) is not None


def override(key: str, text: str | Path) -> str:
    """`key=text` for `load`, whatever characters the text has."""
    quoted = str(text).replace("'", "''").replace("${", "$${")
    return f"{key}='{quoted}'"


def read_override(override: str) -> tuple[tuple[str, ...], Document]:
    """The path and the value of `key.sub=value`. Raises ConfigError."""
    check_bytes(override)
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {brief(override)}: expected key=value, e.g. run.steps=100")
    if key == "base":
        raise ConfigError(
            f"override {brief(override)}: a base is named in a file, not on the command line"
        )
    path = tuple(key.split("."))
    if len(path) > MAX_DEPTH:
        raise ConfigError(
            f"override {brief(override)}: the key has {len(path)} parts, more than {MAX_DEPTH}"
        )
    try:
        return path, read(text)
    except YamlError as error:
        raise ConfigError(
            f"override {brief(override)}: the value is {error} (in the shell, quotes "
            "go around a word with spaces: 'method={name: sft}')"
        ) from None


def check_bytes(override: str) -> None:
    """Raise ConfigError for bytes on the command line that Python could not read as text."""
    try:
        override.encode()
    except UnicodeEncodeError:
        found = os.fsencode(override)
        encoding = sys.getfilesystemencoding()
        advice = f"; {UTF8}" if encoding != "utf-8" else ""
        raise ConfigError(
            f"override {brief(found)}: it holds bytes that are no {encoding}, the "
            f"encoding of this locale{advice}"
        ) from None
