"""Checks of a method's class, made when its name is read in a config."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from tandem.algorithms.base import Method

# what the run calls on every method
CALLS = (
    "demand",
    "commit",
    "request",
    "again",
    "accept",
    "score",
    "rows",
    "terms",
    "probes",
    "credit",
    "diagnostics",
    "observe",
    "metrics",
    "state_dict",
    "load_state_dict",
)


def check_class(cls: Any, owner: str) -> type[Method]:
    """The class, if a config can set its options."""
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise ValueError(
            f"{owner} is {cls!r}; expected a dataclass that inherits tandem.algorithms.base.Method"
        )
    own = inspect.get_annotations(cls)
    options = [field for field, kind in own.items() if "ClassVar" not in str(kind)]
    if options and "__dataclass_fields__" not in cls.__dict__:
        raise ValueError(
            f"{owner}: {cls.__name__} declares {', '.join(options)} but is no "
            "dataclass of its own, so they would be ignored; put @dataclass above it"
        )
    check_calls(cls, owner)
    if hasattr(cls, "aligned"):
        raise ValueError(
            f"{owner}: {cls.__name__} sets `aligned`, which is called prompts_from_experts now"
        )
    return cls


def check_calls(cls: type[Method], owner: str) -> None:
    """Raise ValueError if a method lacks a call, or has one that takes other arguments."""
    for name in ("rows", "terms"):
        if getattr(cls, name) is getattr(Method, name):
            raise ValueError(f"{owner}: {cls.__name__} has no `{name}`, which every method needs")
    for name in CALLS:
        expected = inspect.signature(getattr(Method, name))
        own = inspect.signature(getattr(cls, name))
        try:
            own.bind(*expected.parameters)
        except TypeError as error:
            arguments = ", ".join(expected.parameters)
            raise ValueError(
                f"{owner}: {cls.__name__}.{name} is defined as {name}{own}, but is called with "
                f"({arguments}): {error}"
            ) from None
