"""`tandem methods`: every method by family, with its paper and where it lives."""

from __future__ import annotations

import inspect
import os

from tandem.algorithms.registry import METHODS, distribution, installed, method_class


def print_methods() -> int:
    """1 if one cannot be loaded, else 0."""
    families: dict[str, list[str]] = {}
    for name, family in METHODS.items():
        families.setdefault(family, []).append(name)
    if installed():
        families["from other packages"] = list(installed())
    broken = 0
    for family, names in families.items():
        print(f"{family}:")
        for name in names:
            broken += not print_method(name)
    return 1 if broken else 0


def print_method(name: str) -> bool:
    """False if it cannot be loaded: one broken method must not hide the others."""
    try:
        cls = method_class(name)
    except Exception as error:
        print(f"  {name:<14} cannot be loaded: {error}")
        return False
    paper = f"arXiv {cls.paper}" if cls.paper else "no single paper"
    print(f"  {name:<14} {cls.title}")
    print(f"  {'':<14} {paper:<18} {place(name, cls)}")
    return True


def place(name: str, cls: type) -> str:
    """The file of a method that comes with Tandem, the package of any other."""
    if name in METHODS:
        return os.path.relpath(inspect.getfile(cls))
    return distribution(installed()[name][0])
