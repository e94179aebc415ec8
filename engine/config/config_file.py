"""From a config file and the overrides of a command line to one tree of plain values.

Nothing is known here of the keys themselves; engine/config/parse.py checks them.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.config.yaml_reader import MAX_DEPTH, Document, YamlError, decode, read
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest

PACKAGED = "tandem:"
UTF8 = "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


@dataclass
class Tree:
    """The values, the dotted keys that overrides set, and the numbers and booleans as written."""

    values: dict[str, Any]
    overridden: set[str]
    written: dict[tuple, str]


def read_tree(path: Path, overrides: list[str] = ()) -> Tree:
    """The file's tree with every `key.sub=value` put in. Raises ConfigError."""
    document = read_file(path)
    overridden = set()
    for override in overrides:
        overridden.add(put(document, override, path))
    return Tree(document.value, overridden, document.written)


def find_config(name: str | Path) -> Path:
    """The file of a config: a path, or `tandem:NAME` for one that comes with the package."""
    text = str(name)
    if not text.startswith(PACKAGED):
        return Path(name).expanduser()
    known = packaged()
    if (wanted := text.removeprefix(PACKAGED)) not in known:
        raise ConfigError(
            f"config {text!r}: no such config comes with the package"
            f"{closest(wanted, known)}; `tandem configs` lists them"
        )
    return known[wanted]


def packaged() -> dict[str, Path]:
    """The configs of the package by name, e.g. demo or methods/chord_mu."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def first_comment(path: Path) -> str:
    """The first line of a config, which says what it is."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip()


def read_file(path: Path) -> Document:
    """A document whose value is a mapping. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"config {str(path)!r}: a folder, expected a YAML file{beside(path)}")
    if not path.exists():
        raise ConfigError(f"config {str(path)!r}: there is no such file{beside(path)}")
    try:
        document = read(decode(path.read_bytes()))
    except YamlError as error:
        raise ConfigError(f"config {path}: {error}") from None
    except OSError as error:
        raise ConfigError(f"config {path} cannot be read: {error}") from None
    if document.value is None:
        document.value = {}
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"config {path}: expected a mapping of sections at the top, "
            f"found {type(document.value).__name__}"
        )
    return document


def beside(path: Path) -> str:
    """A file of a similar name in the same folder, as a question, or ''."""
    if not path.parent.is_dir():
        return ""
    return closest(path.name, [other.name for other in path.parent.glob("*.yaml")])


def override(key: str, text: str | Path) -> str:
    """`key=text` for `load`, whatever characters the text has."""
    quoted = str(text).replace("'", "''").replace("${", "$${")
    return f"{key}='{quoted}'"


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


def put(document: Document, override: str, path: Path) -> str:
    """Set one override in the document; returns its key. Raises ConfigError."""
    check_bytes(override)
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {brief(override)}: expected key=value, e.g. run.steps=100")
    parts = tuple(key.split("."))
    if len(parts) > MAX_DEPTH:
        raise ConfigError(
            f"override {brief(override)}: the key has {len(parts)} parts, more than {MAX_DEPTH}"
        )
    try:
        given = read(text)
    except YamlError as error:
        raise ConfigError(
            f"override {brief(override)}: the value is {error} (in the shell, quotes "
            "go around a word with spaces: 'method={name: sft}')"
        ) from None
    node = document.value
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(
                f"override {brief(override)}: {part!r} is a value in {path}, not a section"
            )
    node[parts[-1]] = given.value
    document.forget(parts)
    for below, words in given.written.items():
        document.written[(*parts, *below)] = words
    return key
