"""Rows of JSON files, each with its place in the file: one object a line, or a list of objects."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tandem.engine.core.errors import ConfigError

Row = dict[str, Any]


def json_lines(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """(line, row) of a file with one JSON object a line; blank lines are skipped.

    Raises ConfigError that begins with FILE:LINE, the first line being 1.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        for line, data in enumerate(file, 1):
            if data.strip():
                row = parse(data, f"{name}:{line}", "one JSON object a line")
                yield line, checked_row(row, f"{name}:{line}")


def json_list(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """(number, row) of a file with a list of JSON objects, the first row being 1."""
    rows = parse(path.read_bytes(), name, "a list of JSON objects")
    for number, row in enumerate(rows, 1):
        yield number, checked_row(row, f"{name}:{number}")


def is_list(path: Path) -> bool:
    """Whether a JSON file begins like a list."""
    with path.open("rb") as file:
        for line in file:
            start = line.removeprefix(b"\xef\xbb\xbf").strip()
            if start:
                return start.startswith(b"[")
    return False


def parse(data: bytes, label: str, expected: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ConfigError(f"{label}: not valid JSON: {error}; expected {expected}") from None
    except RecursionError:
        raise ConfigError(f"{label}: the JSON is nested too deeply to be read") from None


def checked_row(row: Any, label: str) -> Row:
    if not isinstance(row, dict):
        raise ConfigError(
            f"{label}: expected a JSON object with named columns, found {type(row).__name__}"
        )
    return row
