"""Dataset rows by number, whether they come from a file, the datasets library or a generated task.

Every kind of rows has `len(rows)`, `rows[i]` -> dict of plain Python values, and `rows.label(i)`,
by which an error (and a prompt without an id) names the row. Whatever is wrong with a source is a
ConfigError that says where.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandem.engine.config.paths import shown
from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.text import closest
from tandem.engine.data.json_rows import is_list, json_lines, json_list
from tandem.engine.data.library_rows import read_library
from tandem.engine.data.tasks import GeneratedRows, is_generated


class Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...

    def label(self, number: int) -> str: ...


@dataclass(frozen=True)
class StoredRows:
    """Rows that lie in a file."""

    length: int
    row_of: Callable[[int], dict[str, Any]]
    label_of: Callable[[int], str]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.row_of(number)

    def label(self, number: int) -> str:
        return self.label_of(number)


def open_rows(dataset: DatasetConfig) -> Rows:
    """The rows that `dataset` names, not yet looked into.

    Raises ConfigError if there are none, or if the source cannot be read.
    """
    path = Path(dataset.path).expanduser()
    if not dataset.path:
        raise ConfigError(
            "a dataset has no path: name a .jsonl, .json or .parquet file, a Hugging "
            "Face dataset, task:NAME or reasoning_gym:TASK"
        )
    if is_generated(dataset.path):
        rows = GeneratedRows(dataset)
    elif path.name.endswith(tuple(READERS)) and not path.is_dir():
        rows = read_file(path, dataset)
    elif path.is_file():
        raise ConfigError(
            f"dataset {dataset.path!r}: a file must end in {', '.join(READERS)}; "
            "other kinds are read by the datasets library, e.g. `path: csv` with "
            f"`options: {{data_files: {path.name}}}`"
        )
    else:
        rows = read_library(path, dataset)
    if len(rows) == 0:
        raise ConfigError(f"dataset {dataset.path!r} is empty: expected at least one row")
    return rows


def read_file(path: Path, dataset: DatasetConfig) -> Rows:
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    if not path.is_file():
        near = ""
        if path.parent.is_dir():
            near = closest(path.name, [other.name for other in path.parent.glob("*" + suffix)])
        raise ConfigError(
            f"dataset {dataset.path!r}: there is no such file{near}; looked for {path.absolute()}"
        )
    try:
        return READERS[suffix](path, shown(path))
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"dataset {dataset.path!r} cannot be read: {error}") from None


def read_jsonl(path: Path, name: str) -> StoredRows:
    """One JSON object a line; blank lines are skipped. Labels are FILE:LINE, the first being 1."""
    return placed(json_lines(path, name), name)


def read_json(path: Path, name: str) -> StoredRows:
    """A list of JSON objects, or one a line. Labels of a list are FILE:ROW, the first being 1."""
    read = json_list if is_list(path) else json_lines
    return placed(read(path, name), name)


def placed(found: Iterable[tuple[int, dict[str, Any]]], name: str) -> StoredRows:
    rows = []
    places = []
    for place, row in found:
        rows.append(row)
        places.append(place)
    return StoredRows(len(rows), rows.__getitem__, lambda i: f"{name}:{places[i]}")


def read_parquet(path: Path, name: str) -> StoredRows:
    """Labels are FILE:ROW, the first row being 1."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"dataset {name!r} cannot be read as Parquet: {error}") from None

    def row(number: int) -> dict[str, Any]:
        return table.slice(number, 1).to_pylist()[0]

    return StoredRows(len(table), row, lambda number: f"{name}:{number + 1}")


READERS = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}
