"""A user's own method or reward, found by its path. Imports nothing heavy: reward worker processes use it and must stay small."""
from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any


def load_object(spec: str, kind: str) -> Any:
    """The object named by `package.module:Name` or `path/to/file.py:Name`.

    The file's folder, or for a package the current folder, becomes importable (last in the search path), so that it can import its neighbours.
    Raises ValueError that says what is missing: the colon, the file, or the name in it; or what its code raised when it was imported, and where.
    """
    module_name, colon, attribute = spec.rpartition(":")
    if not colon:
        raise ValueError(f"{kind} {spec!r} is neither a known name nor of the form file.py:Name or package.module:Name")
    folder = str(Path(module_name).expanduser().resolve().parent if module_name.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    if module_name.endswith(".py"):
        path = Path(module_name).expanduser().resolve()
        if not path.is_file():
            raise ValueError(f"{kind} {spec!r}: there is no file {path}")
        key = f"tandem_user_{path.stem}_{abs(hash(str(path)))}"
        if key not in sys.modules:
            module_spec = importlib.util.spec_from_file_location(key, path)
            module = importlib.util.module_from_spec(module_spec)
            sys.modules[key] = module
            try:
                module_spec.loader.exec_module(module)
            except BaseException as error:
                del sys.modules[key]
                if not isinstance(error, Exception):
                    raise
                raise not_importable(kind, spec, error) from error
        module = sys.modules[key]
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise ValueError(f"{kind} {spec!r}: no module named {error.name!r}; for a file write its path with .py") from None
        except Exception as error:
            raise not_importable(kind, spec, error) from error
    if not hasattr(module, attribute):
        raise ValueError(f"{kind} {spec!r}: {module.__file__} has no {attribute!r}")
    return getattr(module, attribute)


def not_importable(kind: str, spec: str, error: Exception) -> ValueError:
    """The error that the user's code raised, with its place; a SyntaxError has its own."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = "" if isinstance(error, SyntaxError) else f" ({frame.filename}:{frame.lineno})"
    return ValueError(f"{kind} {spec!r} cannot be imported: {type(error).__name__}: {error}{place}")
