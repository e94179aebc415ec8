"""One line of a JSONL file: any record as strict JSON in valid UTF-8.

Nothing in a record can stop the run that writes it: numbers that are not finite are null, lone
surrogates are spelled out, and what JSON does not know becomes its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from tandem.engine.core.foreign import COLUMN_CHARACTERS, ID_CHARACTERS, cut, text_of, valid

DEEPEST = 64  # nested mappings and lists; JSON readers give up on deeper ones
LONGEST_INTEGER = 4_096  # bits; Python writes no longer decimal than 4,300 digits


def append_to(path: Path) -> TextIO:
    return open(path, "a", encoding="utf-8")


def write_line(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(to_json(plain(record)) + "\n")


def to_json(value: Any) -> str:
    """JSON of a value that `plain` made."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def plain(value: Any, depth: int = 0) -> Any:
    """`value` in JSON's types: arrays are lists, numbers that are not finite are None, and anything
    JSON does not know is its text.

    float32 takes its shortest decimal form, which reads back as the same float32.
    """
    if depth > DEEPEST:
        return f"<nested deeper than {DEEPEST}>"
    if isinstance(value, str):
        return valid(value)
    if isinstance(value, np.ndarray):
        return plain_array(value, depth)
    if isinstance(value, Mapping):
        return {plain_key(key): plain(entry, depth + 1) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, depth + 1) for entry in value]
    return plain_scalar(python_scalar(value))


def plain_key(key: Any) -> str:
    return valid(cut(text_of(key), ID_CHARACTERS))


def python_scalar(value: Any) -> Any:
    """Python's own number for a numpy scalar or a tensor without dimensions; others as they are."""
    if isinstance(value, np.generic) and value.dtype == np.float32:
        return float(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def plain_scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int):
        bits = value.bit_length()
        return value if bits <= LONGEST_INTEGER else f"<integer of {bits} bits>"
    return valid(text_of(value))


def plain_array(value: np.ndarray, depth: int) -> Any:
    if value.dtype.kind in "iub":
        return value.tolist()
    if value.dtype.kind != "f":
        return plain(value.tolist(), depth)
    if value.dtype == np.float32:
        value = value.astype(str)  # the shortest form
    numbers = value.astype(np.float64)
    if np.isfinite(numbers).all():
        return numbers.tolist()
    return plain(numbers.tolist(), depth)


def plain_columns(columns: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the columns of a dataset row in JSON's types, names of those that were cut).

    A column longer than COLUMN_CHARACTERS, as text or as JSON, is the beginning of that, with a
    mark at its end.
    """
    shortened = []
    record = plain(columns)
    for name, entry in record.items():
        if entry is None or isinstance(entry, (bool, int, float)):
            continue
        text = entry if isinstance(entry, str) else to_json(entry)
        if len(text) > COLUMN_CHARACTERS:
            record[name] = cut(text, COLUMN_CHARACTERS)
            shortened.append(name)
    return record, shortened
