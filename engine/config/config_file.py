"""Config files: those of the package by name, and a file together with the base it names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tandem.engine.config.tree import Tree
from tandem.engine.config.yaml_reader import Document, YamlError, decode, read
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import brief, closest

PACKAGED = "tandem:"


def read_tree(name: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """A config file over its bases, and every `key.sub=value` on top. Raises ConfigError."""
    path = find_config(name)
    tree = Tree(path)
    for file, document in reversed(read_with_bases(path).items()):
        tree.lay(document, file)
    for override in overrides:
        tree.put(override)
    return tree


def find_config(name: str | Path) -> Path:
    """The file of a config: a path, or `tandem:NAME` for one that comes with the package."""
    text = str(name)
    if not text.startswith(PACKAGED):
        return Path(name).expanduser()
    return from_package(text, packaged())


def from_package(name: str, known: dict[str, Path]) -> Path:
    """The file that `tandem:NAME` means. Raises ConfigError."""
    wanted = name.removeprefix(PACKAGED)
    if wanted not in known:
        raise ConfigError(
            f"config {name!r}: no such config comes with the package"
            f"{closest(wanted, known)}; `tandem configs` lists them"
        )
    return known[wanted]


def packaged() -> dict[str, Path]:
    """The configs of the package by name, e.g. demo or methods/chord_mu.

    Files whose name begins with _ are bases of others, and not listed.
    """
    return {name: path for name, path in with_bases().items() if not path.name.startswith("_")}


def with_bases() -> dict[str, Path]:
    """`packaged`, and the files that are bases only."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    found = {}
    for path in sorted(folder.rglob("*.yaml")):
        found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def first_comment(path: Path) -> str:
    """The first line of a config, which says what it is."""
    line = path.read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip()


def read_with_bases(path: Path) -> dict[Path, Document]:
    """{file: what it says}: the config, its base, the base of that, and so on."""
    documents = {path: read_file(path)}
    seen = {path.resolve()}
    base = take_base(documents[path], path)
    while base is not None:
        if base.resolve() in seen:
            raise ConfigError(
                f"config {path}: its base is {base}, which is the file itself or has it for a "
                "base; a chain of bases must end"
            )
        seen.add(base.resolve())
        documents[base] = read_file(base)
        path, base = base, take_base(documents[base], base)
    return documents


def take_base(document: Document, path: Path) -> Path | None:
    """The file that `base` of this document names, beside `path`; None where it names none."""
    name = document.value.pop("base", None)
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"base: found {brief(name)}, expected the name of a config file, set in {path}"
        )
    if name.startswith(PACKAGED):
        return find_base(name, path)
    base = path.parent / os.path.expanduser(name)
    if not os.path.isfile(base):
        raise ConfigError(
            f"config {path}: its base is {brief(name)}, but there is no file "
            f"{brief(str(base))}{beside(base)}; a base is named relative to the folder of the "
            "file that names it"
        )
    return base


def find_base(name: str, path: Path) -> Path:
    """The file of a base that comes with the package. Raises ConfigError."""
    try:
        return from_package(name, with_bases())
    except ConfigError as error:
        raise ConfigError(f"{error} (base of {path})") from None


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
