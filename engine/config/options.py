"""From a mapping in a config to a dataclass: keys are checked against its fields, values against
their annotations, and errors name the key.

A type with a classmethod `parse(value, key)` reads what the config has for it. A field's metadata
may give it another `key` in the config than its name, or with `as_given` leave its value to the
dataclass's own `__post_init__`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from tandem.engine.config.words import describe
from tandem.engine.core.text import closest

T = TypeVar("T")
PLAIN = (int, float, bool, str, dict, list, types.NoneType)


def key_of(field: dataclasses.Field) -> str:
    """What a field is called in a config."""
    return field.metadata.get("key", field.name)


def build(cls: type[T], options: Any, key: str, owner: str | None = None) -> T:
    """`cls(**options)`.

    Raises ValueError if `options` is no mapping, has a key that is no field of `cls`, or a value
    that is none of its field's types.

    `key` is where the options stand in the config, e.g. method.policy; `owner` is what the message
    about an unknown key calls it instead.
    """
    if isinstance(options, cls):
        return options
    if not isinstance(options, Mapping):
        raise ValueError(f"{key}: found {options!r}, expected a mapping of options")
    known = {key_of(f): f for f in option_fields(cls)}
    hints = field_types(cls)
    values = {}
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"{owner or key} has no option {name!r}{closest(name, known)}; its options: "
                f"{', '.join(known) or 'none'}"
            )
        field = known[name]
        if not field.metadata.get("as_given"):
            value = typed(hints[field.name], value, f"{key}.{name}")
        values[field.name] = value
    return cls(**values)


def option_fields(cls: Any) -> list[dataclasses.Field]:
    """The fields of a dataclass that a config may set."""
    return [field for field in dataclasses.fields(cls) if field.init]


def field_types(cls: type) -> dict[str, Any]:
    """{field: its type}. Raises ValueError for a type that is text, as with
    `from __future__ import annotations`, and names what is not there."""
    try:
        return typing.get_type_hints(cls)
    except NameError as error:
        raise ValueError(
            f"{cls.__name__}: an annotation of it or of its base classes names {error.name!r}, "
            "which its module does not have when the options are read; import or define it at the "
            "top of the module, not under `if TYPE_CHECKING:` and not inside a function"
        ) from error


def typed(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint` wants it, or a ValueError.

    As everywhere in a config, a number may come as text (`2e-4` is text to YAML 1.1), and an
    integer as 3.0.

    A mapping becomes the dataclass that the hint names, unless the hint names dict too: then the
    owner of the option makes something of it.
    """
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if union else (hint,)
    if any(fits(kind, value) for kind in kinds):
        return value
    for kind in kinds:
        number = read_number(kind, value) if kind in (int, float) else None
        if number is not None:
            return number
        parse = getattr(kind, "parse", None)
        if parse is not None:
            return parse(value, key)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return build(typing.cast(type, kind), value, key)
    words = []
    for kind in kinds:
        if typing.get_origin(kind) is Literal:
            words += typing.get_args(kind)
    raise ValueError(f"{key}: found {value!r}{closest(value, words)}, expected {describe(hint)}")


def fits(kind: Any, value: Any) -> bool:
    """Whether `value` is a `kind` as it stands.

    Kinds that no config can hold or that say more than a type (Path, list[int], Any) are their
    owner's to check.
    """
    if typing.get_origin(kind) is Literal:
        return any(type(value) is type(word) and value == word for word in typing.get_args(kind))
    if kind in (int, float):
        return type(value) is kind and not math.isnan(value)
    is_checked = kind in PLAIN or dataclasses.is_dataclass(kind)
    return not is_checked or isinstance(value, typing.cast(type, kind))


def read_number(kind: type, value: Any) -> float | int | None:
    """None for what is not a number of that kind. Infinity is one: it switches a clip off."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if math.isnan(number):
        return None
    if kind is int and not number.is_integer():
        return None
    return kind(number)
