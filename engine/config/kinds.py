"""The types that keys of a config have, with their bounds.

Types are strict: nothing is taken for something else without a word. Numbers alone may come as
text, which is what YAML 1.1 makes of 1e-6, and what `${NAME}` is.

Light: reward workers and engines hold a config and need no pydantic for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

TOO_LARGE = 1 << 63  # for an integer of 64 bits


def number(value: Any) -> float:
    """`value` as a number. Raises ValueError for what is none; true and false are none."""
    if isinstance(value, bool):
        raise ValueError("a boolean")
    try:
        return float(value)
    except (TypeError, OverflowError):
        raise ValueError("no number") from None


def integer(value: Any) -> int:
    """`value` as an integer of 64 bits: 3, 3.0, '3' or '1e3'. Raises ValueError for others."""
    if type(value) is not int:  # float would round a large one
        value = number(value)
        if not value.is_integer():
            raise ValueError("not whole")
    if abs(value) >= TOO_LARGE:
        raise ValueError("too large")
    return int(value)


def boolean(value: Any) -> bool:
    """True and false alone. Raises ValueError for 1, 'yes' and all else."""
    if not isinstance(value, bool):
        raise ValueError("no boolean")
    return value


def no_number(value: Any) -> Any:
    """Python takes 1 for true. Raises ValueError for it."""
    if type(value) in (int, float):
        raise ValueError("a number")
    return value


@dataclass(frozen=True)
class Read:
    """pydantic asks `function` for the value before it checks the type (its BeforeValidator)."""

    function: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, kind: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.function, handler(kind))


Flag = Annotated[bool, Read(boolean)]
Number = Annotated[float, Read(number)]
AtLeastZero = Annotated[float, Ge(0), Read(number)]
Positive = Annotated[float, Gt(0), Read(number)]
Share = Annotated[float, Ge(0), Le(1), Read(number)]
PositiveShare = Annotated[float, Gt(0), Le(1), Read(number)]
Beta = Annotated[float, Ge(0), Lt(1), Read(number)]
Dropout = Annotated[float, Ge(0), Lt(1), Read(number)]
Integer = Annotated[int, Read(integer)]
FromZero = Annotated[int, Ge(0), Read(integer)]
FromOne = Annotated[int, Ge(1), Read(integer)]
Port = Annotated[int, Ge(1), Le(65535), Read(integer)]
Stage = Annotated[Literal[0, 1, 2, 3], Read(integer)]
Resume = Annotated[Literal[False, True, "auto"], Read(no_number)]
Options = dict[Any, Any]  # handed on as they are; who takes them checks them
