"""Methods that were made in Python: how a config names them, and what it tells of them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tandem.algorithms.base import Method
from tandem.algorithms.checks.classes import check_class
from tandem.engine.core.text import brief

MARK = " (object)"  # ends the name of a method that was made in Python
OBJECTS: list[Method] = []  # of this process; a config has the number of its own


class Absent(Method):
    """In the place of one that was made in another process: enough to evaluate a model with."""

    uses_rollouts: ClassVar[bool] = False
    uses_rewards: ClassVar[bool] = False


def is_given(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(MARK)


def give(method: Any) -> dict[str, Any]:
    """The `method:` block of a config for a method made in Python, of which it keeps a copy.

    `code` and `options` are there to be read, and for a resume to compare.

    Raises TypeError for what is no method, or cannot be copied, and ValueError for a class that
    cannot be one.
    """
    if isinstance(method, type) or not isinstance(method, Method):
        advice = ""
        if isinstance(method, type) and issubclass(method, Method):
            advice = f": write {method.__name__}(), with brackets"
        raise TypeError(f"method is {brief(method)}, expected an object of a Method{advice}")
    cls = type(method)
    check_class(cls, "method")
    OBJECTS.append(copied(method))
    return {
        "name": cls.__name__ + MARK,
        "object": len(OBJECTS) - 1,
        "code": digest_of(cls),
        "options": options_of(method),
    }


def taken(block: Mapping[str, Any]) -> Method:
    """The method of such a block, as a new run has it; Absent if it is not of this process."""
    number = block.get("object")
    if not isinstance(number, int) or not 0 <= number < len(OBJECTS):
        return Absent()
    method = OBJECTS[number]
    same = type(method).__name__ + MARK == block["name"] and options_of(method) == block["options"]
    return copied(method) if same else Absent()


def copied(method: Method) -> Method:
    try:
        return copy.deepcopy(method)
    except Exception as error:
        raise TypeError(
            f"method {type(method).__name__} cannot be copied ({type(error).__name__}: {error}); a "
            "run works on a copy: make what cannot be copied when it is first used"
        ) from error


def digest_of(cls: type) -> str:
    """Of the class's source; '' where Python has none, as in an interactive session."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def options_of(method: Method) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(method):
        if hasattr(method, field.name):
            found[field.name] = told(getattr(method, field.name))
    return found


def told(value: Any) -> Any:
    """A value as YAML has it: plain ones as they are, arrays by their content, others by type."""
    if isinstance(value, Enum):
        return told(value.value)
    if isinstance(value, np.generic):
        return told(value.item())
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): told(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [told(entry) for entry in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: told(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray):
        content = hashlib.sha256(value.tobytes()).hexdigest()[:16]
        return f"array {value.dtype} {list(value.shape)} {content}"
    return f"a {type(value).__qualname__}"
