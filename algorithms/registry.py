"""Methods by name, and a method built from the options of a config.

A method that comes with Tandem is a file FAMILY/NAME.py beside this one, with one class that
inherits Method. Other packages bring methods by entry points of the group `tandem.methods`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from tandem.algorithms.base import Method
from tandem.algorithms.checks.classes import check_class
from tandem.algorithms.given import is_given, taken
from tandem.algorithms.parts.policy import PolicyLoss
from tandem.algorithms.rl_method import RLMethod
from tandem.engine.config.options import build
from tandem.engine.core.loading import load_object
from tandem.engine.core.text import closest

GROUP = "tandem.methods"
NOT_FAMILIES = ("checks", "parts")


def shipped() -> dict[str, str]:
    """{name: family}, by listing the folders: nothing is imported, and one broken file breaks one
    method.
    """
    found = {}
    for path in sorted(Path(__file__).parent.glob("*/[a-z]*.py")):
        if path.parent.name not in NOT_FAMILIES:
            found[path.stem] = path.parent.name
    return found


METHODS = shipped()


@cache
def installed() -> dict[str, list[EntryPoint]]:
    """{name: entry points} of the installed packages; more than one where they clash."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def method_class(name: str) -> type[Method]:
    """The class of a method that comes with Tandem or an installed package, or of a user's
    `file.py:Class`.

    Raises ValueError for anything else, and where several have the name.
    """
    if ":" in name:
        return check_class(load_object(name, "method"), f"method {name!r}")
    points = installed().get(name, [])
    check_clash(name, points)
    if name in METHODS:
        return only_class(f"tandem.algorithms.{METHODS[name]}.{name}")
    if points:
        return installed_class(points[0])
    known = [*METHODS, *installed()]
    raise ValueError(
        f"unknown method {name!r}{closest(name, known)}; known: {', '.join(known)}, "
        "or a path my_method.py:MyMethod"
    )


def only_class(module_name: str) -> type[Method]:
    """The only Method that a module defines."""
    module = importlib.import_module(module_name)
    found = []
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module_name
        ):
            found.append(value)
    if len(found) != 1:
        names = ", ".join(cls.__name__ for cls in found) or "none"
        raise ValueError(
            f"{module.__file__} defines {names}; expected exactly one class that inherits Method, "
            "since the file's name is the method's"
        )
    return check_class(found[0], f"method {module_name.rpartition('.')[2]!r}")


def installed_class(point: EntryPoint) -> type[Method]:
    """The class that an entry point names. Raises ValueError that names its package."""
    owner = f"method {point.name!r} of the installed package {distribution(point)}"
    try:
        found = load_object(point.value, "its entry point")
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from error
    return check_class(found, owner)


def check_clash(name: str, points: list[EntryPoint]) -> None:
    owners = [distribution(point) for point in points]
    if name in METHODS:
        owners.insert(0, "Tandem itself")
    if len(owners) > 1:
        raise ValueError(
            f"method {name!r} is there more than once, from {' and '.join(owners)}; uninstall one "
            "of these packages, or name the class you mean, package.module:Class"
        )


def distribution(point: EntryPoint) -> str:
    """Name and version of the package that an entry point belongs to."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else "of unknown name"


def configured(block: Mapping[str, Any]) -> Method:
    """The method of a config's `method:` block, `name` and options."""
    if is_given(block["name"]):
        return taken(block)
    return make_method(block["name"], {key: value for key, value in block.items() if key != "name"})


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method from the config's `method:` block; unknown options and values of the wrong
    type are a ValueError that names the key.
    """
    cls = method_class(name)
    if "demos" in options and not is_option(cls, "demos"):
        raise ValueError(no_demos(name, cls))
    method = build(cls, options, "method", f"method {name!r}")
    if isinstance(method, RLMethod) and not isinstance(method.policy, PolicyLoss):
        raise ValueError(
            f"method {name!r}: its policy is still {method.policy!r} after "
            f"{cls.__name__}.__post_init__; begin that with super().__post_init__()"
        )
    return method


def is_option(cls: type[Method], name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(cls))


def no_demos(name: str, cls: type[Method]) -> str:
    """Why a method takes no `demos`."""
    with_demos = [known for known in METHODS if is_option(method_class(known), "demos")]
    reason = "it trains no demonstrations"
    if cls.uses_experts:
        reason = "what it does with demonstrations is its own formula, see its docstring"
    return (
        f"method.demos is given, but method {name!r} has no such option: {reason}; methods with "
        f"demos: {', '.join(with_demos)}"
    )
