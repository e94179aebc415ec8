"""From a mapping in a config to a dataclass, with errors that name the closest known option."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def build(cls: type[T], options: Any, owner: str) -> T:
    """`cls(**options)`; raises ValueError if `options` is no mapping or has a key that is no field of `cls`. `owner` is the config key, for the message."""
    from tandem.engine.config import closest
    if isinstance(options, cls):
        return options
    if not isinstance(options, Mapping):
        raise ValueError(f"{owner}: found {options!r}, expected a mapping of options")
    known = {f.name.rstrip("_"): f.name for f in dataclasses.fields(cls) if f.init}     # `as` is a word of Python, so its field is `as_`
    for key in options:
        if key not in known:
            raise ValueError(f"{owner} has no option {key!r}{closest(key, known)}; its options: {', '.join(known) or 'none'}")
    return cls(**{known[key]: value for key, value in options.items()})
