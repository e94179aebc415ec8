"""`as: paper | code`, the option of methods whose paper and authors' code differ."""

from __future__ import annotations

from dataclasses import field
from typing import Any, TypeVar

T = TypeVar("T")


def variant_option(default: str = "paper") -> Any:
    """The field of a method, `variant: str`; `as`, its key in a config, is a word of Python."""
    return field(default=default, metadata={"key": "as"})


def check_variant(variant: str) -> None:
    if variant not in ("paper", "code"):
        raise ValueError(f"as is {variant!r}; known: paper, code")


def select(variant: str, paper: T, code: T) -> T:
    """What `variant` selects. Raises ValueError for an unknown one."""
    check_variant(variant)
    return paper if variant == "paper" else code
