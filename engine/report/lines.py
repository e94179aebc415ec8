"""One line of a JSONL file: any record as strict JSON in valid UTF-8.

Nothing in a record can stop the run that writes it: numbers that are not finite are null, lone
surrogates are spelled out, and what JSON does not know becomes its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from tandem.engine.core.foreign import COLUMN_CHARACTERS, ID_CHARACTERS, cut, text_of, valid

DEEPEST = 64  # nested mappings and lists; JSON readers give up on deeper ones
LONGEST_INTEGER = 4_096  # bits; Python writes no longer decimal than 4,300 digits


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
    if isinstance(value, np.float32):
        value = float(str(value))
    # numpy scalar, 0-d tensor
    elif isinstance(value, np.generic) or (
        hasattr(value, "item") and getattr(value, "ndim", None) == 0
    ):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {
            valid(cut(text_of(key), ID_CHARACTERS)): plain(entry, depth + 1)
            for key, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain(entry, depth + 1) for entry in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return (
            value
            if value.bit_length() <= LONGEST_INTEGER
            else f"<integer of {value.bit_length()} bits>"
        )
    return valid(text_of(value))


def plain_array(value: np.ndarray, depth: int) -> Any:
    if value.dtype.kind in "iub":
        return value.tolist()
    if value.dtype.kind != "f":
        return plain(value.tolist(), depth)
    numbers = (
        value.astype(str).astype(np.float64)
        if value.dtype == np.float32
        else value.astype(np.float64)
    )
    return numbers.tolist() if np.isfinite(numbers).all() else plain(numbers.tolist(), depth)


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
