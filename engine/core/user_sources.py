"""Which of the imported modules are the user's, and their source: what an actor on a node without
the files imports from.

The user's are the files that a config names and every Python module that they import, directly or
not, at the top or inside a function, as long as it is neither installed (in site-packages, or
claimed by an installed distribution) nor Python's own. Compiled modules and data files have no
source to keep.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import NamedTuple


class Source(NamedTuple):
    """A module's file as it was read."""

    path: str
    data: bytes


# {module name: source} of modules that are imported from here and not from their files
SOURCES: dict[str, Source] = {}


class SourceFinder(importlib.abc.MetaPathFinder):
    """Finds the modules of SOURCES."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname not in SOURCES:
            return None
        file = SOURCES[fullname].path
        return importlib.util.spec_from_file_location(
            fullname, file, loader=KeptLoader(fullname, file)
        )


class KeptLoader(SourceFileLoader):
    """Runs a module of SOURCES.

    Tracebacks and `inspect` show its lines, also where the file is not.
    """

    def get_data(self, path: str) -> bytes:
        return SOURCES[self.name].data if path == self.path else super().get_data(path)

    def path_stats(self, path: str):
        raise OSError("no bytecode files for modules that are not imported from their files")


sys.meta_path.insert(0, SourceFinder())


def with_imports(name: str) -> dict[str, Source]:
    """{module name: source} of an imported module, of all that it imports, and of what else was
    imported from its folder; only what is the user's.
    """
    home = folder_of(name)
    waiting = [name]
    if not in_library(home):
        waiting += imported_from(home)
    found: dict[str, Source] = {}
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        source = find_source(name, home)
        if source is None:
            continue
        found[name] = source
        inside = Path(source.path).name == "__init__.py"
        package = name if inside else name.rpartition(".")[0]
        for module in [name, *imported_names(source.data, package)]:
            waiting.extend(with_parents(module))
    return found


def folder_of(name: str) -> Path:
    """The folder in which an imported module, or its outermost package, lies."""
    module = sys.modules[name]
    file = Path(module.__file__ or Path(next(iter(module.__path__)), "__init__.py"))
    inner = name.count(".") + (file.name == "__init__.py")
    return file.parents[inner]


def imported_from(folder: Path) -> list[str]:
    """Modules that were imported from a folder, by whatever means."""
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name == "__main__" or not file or not Path(file).is_relative_to(folder):
            continue
        if not in_library(Path(file)):  # an environment often lies in the project's folder
            found.append(name)
    return found


def imported_names(data: bytes, package: str) -> Iterator[str]:
    """Dotted names that a module's import statements, also those in functions, may mean: of `from a
    import b` both a and a.b.

    `package` is what relative imports start from. What is no Python has none.
    """
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue  # it would fail when it is run, too
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def with_parents(name: str) -> Iterator[str]:
    """a.b.c, a.b and a."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def find_source(name: str, home: Path) -> Source | None:
    """The source of a module that is the user's, imported or not; None for others, and for what has
    no source in Python.
    """
    if name in SOURCES:
        return SOURCES[name]
    spec = find_spec(name)
    if spec is None:
        return None
    namespace = spec.origin is None and spec.submodule_search_locations
    file = Path(next(iter(namespace)), "__init__.py") if namespace else Path(spec.origin or "")
    if file.suffix != ".py" or is_installed(name, file, home):
        return None
    try:
        return Source(str(file), b"" if namespace else file.read_bytes())
    except OSError:
        return None  # importing it fails, here as there


def find_spec(name: str) -> ModuleSpec | None:
    """Where Python would import a module from, found without importing its packages."""
    spec, folders, known = None, None, ""
    for part in name.split("."):
        if known and folders is None:
            return None  # an attribute of a module, not a module
        known = f"{known}.{part}" if known else part
        spec = PathFinder.find_spec(known, folders)
        if spec is None:
            return None
        folders = spec.submodule_search_locations
    return spec


def is_installed(name: str, file: Path, home: Path) -> bool:
    """Whether a module belongs to Python, to Tandem or to an installed package, so that every node
    has it.
    """
    top = name.partition(".")[0]
    if top == "tandem" or in_library(file):
        return True
    return not file.is_relative_to(home) and top in distributions()


def in_library(path: Path) -> bool:
    """Whether a file or folder is one of installed packages or of Python's own library."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    return any(path.is_relative_to(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib"))


@cache
def distributions() -> frozenset[str]:
    """Names that installed distributions claim, those installed in place (`pip install -e`) too.

    Takes a fraction of a second.
    """
    return frozenset(importlib.metadata.packages_distributions())
