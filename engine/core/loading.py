"""A user's own method or reward, found by its path.

Imports nothing heavy: reward worker processes use it and must stay small.

A file gets a module name made of its path, the same in every process: two files of one name do not
clash, and what is pickled here is found there. The source of all that was loaded is kept as it was
then; actors get it (`user_code`) and import from it (`install`), whether or not their node has the
files.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import traceback
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tandem.engine.core.text import shorten
from tandem.engine.core.user_sources import SOURCES, Source, imported_names, with_imports

PREFIX = "tandem_user_"  # of the module names of files
LONGEST = 500  # characters of an error of the user's own that are shown


@dataclass
class UserCode:
    """Everything of the user's that was loaded in a process."""

    # {what a spec has before its colon: module name}
    names: dict[str, str] = field(default_factory=dict)
    # {module name: source}, with all that they import
    sources: dict[str, Source] = field(default_factory=dict)


# loaded in this process
LOADED = UserCode()
# sent by the process that started this one; its names win over what lies on this machine
SENT = UserCode()
FOLDERS: list[str] = []  # made importable here


def load_object(spec: str, kind: str) -> Any:
    """The object named by `package.module:Name` or `path/to/file.py:Name`.

    The file's folder, or for a package the current folder, becomes importable (last in the search
    path), so that it can import its neighbours. Raises ValueError that says what is missing: the
    colon, the file, or the name in it; or what its code raised when it was imported, and where.
    """
    place, colon, attribute = spec.rpartition(":")
    if not colon:
        raise ValueError(
            f"{kind} {spec!r} is neither a known name nor of the form file.py:Name or "
            "package.module:Name"
        )
    if place in SENT.names:
        name = SENT.names[place]
    elif place.endswith(".py"):
        name = register(spec, Path(place).expanduser().resolve(), kind)
    else:
        name = place
        make_importable(str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.startswith(PREFIX) or not f"{name}.".startswith(f"{error.name}."):
            raise not_importable(kind, spec, error) from error
        raise ValueError(
            f"{kind} {spec!r}: no module named {error.name!r}; for a file write its path with .py"
        ) from None
    # a script that ends with sys.exit(main()) would end the run here, and say that all is well
    except (Exception, SystemExit) as error:
        raise not_importable(kind, spec, error) from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"{kind} {spec!r}: {getattr(module, '__file__', None) or name} has no {attribute!r}"
        )
    # every process has a __main__ of its own: nothing can be sent under that name
    travels = name.partition(".")[0] not in ("tandem", "__main__")
    if travels and LOADED.names.get(place) != name:
        LOADED.names[place] = name
        LOADED.sources.update(with_imports(name))
    return getattr(module, attribute)


def user_code() -> UserCode:
    """What an actor must be given so that it can import all that was loaded here."""
    return UserCode({**SENT.names, **LOADED.names}, {**SENT.sources, **LOADED.sources})


def install(code: UserCode) -> None:
    """In an actor: from now on the user's code is imported from what was sent, under the names it
    has in the driver.
    """
    SENT.names.update(code.names)
    SENT.sources.update(code.sources)
    SOURCES.update(code.sources)


def register(spec: str, path: Path, kind: str) -> str:
    """Make a file importable; returns its module name.

    One that was imported already is not looked at again.
    """
    name = module_name(path)
    if name in sys.modules:
        return name
    if not path.is_file():
        raise ValueError(f"{kind} {spec!r}: there is no file {path}")
    try:
        source = Source(str(path), path.read_bytes())
    except OSError as error:
        raise ValueError(f"{kind} {spec!r}: {path} cannot be read: {error}") from error
    check_neighbours(spec, path, source, kind)
    SOURCES[name] = source
    make_importable(str(path.parent))
    return name


def module_name(path: Path) -> str:
    """The same for the same file in every process, another for every other file."""
    data = str(path).encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(data, digest_size=6).hexdigest()
    stem = re.sub(r"[^0-9A-Za-z_]", "_", path.stem)
    return f"{PREFIX}{stem}_{digest}"


def make_importable(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
        FOLDERS.append(folder)


def check_neighbours(spec: str, path: Path, source: Source, kind: str) -> None:
    """Raise ValueError if the file would get the neighbour of another file: Python knows one module
    of a name.
    """
    others = [folder for folder in FOLDERS if folder != str(path.parent)]
    for name in imported_names(source.data, ""):
        candidates = (path.parent / f"{name}.py", path.parent / name / "__init__.py")
        mine = [file for file in candidates if file.is_file()]
        if "." in name or not mine:
            continue
        found = getattr(sys.modules.get(name), "__spec__", None) or PathFinder.find_spec(name)
        origin = getattr(found, "origin", None)
        if origin is None or Path(origin).resolve() in mine:
            continue
        if any(Path(origin).is_relative_to(folder) for folder in others):
            raise ValueError(
                f"{kind} {spec!r} imports {name!r}, of which there are two: {mine[0]}, which it "
                f"means, and {origin}, which another file of this run uses; Python can import "
                "one module of a name, so rename one of them"
            )


def not_importable(kind: str, spec: str, error: BaseException) -> ValueError:
    """The error that the user's code raised, with its place; a SyntaxError has its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}:{frame.lineno})"
    words = shorten(str(error), LONGEST)
    hint = ""
    if isinstance(error, ImportError) and "relative import" in words:
        hint = (
            "; a module that imports relatively is named by its package: package.module:Name, "
            "from the folder that holds the package"
        )
    return ValueError(
        f"{kind} {spec!r} cannot be imported: {type(error).__name__}: {words}{place}{hint}"
    )
