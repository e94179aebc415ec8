"""Dataset rows by number, wherever they come from: JSONL, Parquet, a Hugging Face dataset or a generated task.

Every kind of rows has `len(rows)`, `rows[i]` -> dict of plain Python values, and `rows.label(i)`, by which an error (and a prompt without an id) names
the row. Whatever is wrong with a source is a ConfigError that says where.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tandem.engine.config import ConfigError, DatasetConfig, closest
from tandem.engine.hub import use_cache_if_unreachable
from tandem.engine.paths import FILE_BUILDERS, shown
from tandem.engine.tasks import GeneratedRows, is_generated


class Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> dict[str, Any]: ...

    def label(self, number: int) -> str: ...


@dataclass(frozen=True)
class StoredRows:
    """Rows that lie in a file or a Hugging Face dataset."""

    length: int
    get: Callable[[int], dict[str, Any]]
    label: Callable[[int], str]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.get(number)


def open_rows(dataset: DatasetConfig) -> Rows:
    """The rows that `dataset` names, not yet looked into. Raises ConfigError if there are none, or if the source cannot be read."""
    path = Path(dataset.path).expanduser()
    if not dataset.path:
        raise ConfigError("a dataset has no path: name a .jsonl or .parquet file, a Hugging Face dataset, task:NAME or reasoning_gym:TASK")
    if is_generated(dataset.path):
        rows = GeneratedRows(dataset)
    elif path.suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            near = closest(path.name, [p.name for p in path.parent.glob("*" + path.suffix)]) if path.parent.is_dir() else ""
            raise ConfigError(f"dataset {dataset.path!r}: there is no such file{near}; looked for {path.absolute()}")
        rows = read_jsonl(path, shown(path)) if path.suffix == ".jsonl" else read_parquet(path, shown(path))
    elif path.is_file():
        raise ConfigError(f"dataset {dataset.path!r}: a file must end in .jsonl (one JSON object a line) or .parquet")
    else:
        rows = read_hugging_face(path, dataset)
    if len(rows) == 0:
        raise ConfigError(f"dataset {dataset.path!r} is empty: expected at least one row")
    return rows


def read_jsonl(path: Path, name: str) -> StoredRows:
    """One JSON object a line; blank lines are skipped. Labels are FILE:LINE, the first line being 1."""
    rows, lines = [], []
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            try:
                row = json.loads(data)
            except ValueError as error:     # JSONDecodeError and UnicodeDecodeError
                raise ConfigError(f"{name}:{line}: not valid JSON: {error}; expected one JSON object a line") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{name}:{line}: expected a JSON object with named columns, found {type(row).__name__}")
            rows.append(row)
            lines.append(line)
    return StoredRows(len(rows), rows.__getitem__, lambda i: f"{name}:{lines[i]}")


def read_parquet(path: Path, name: str) -> StoredRows:
    """Labels are FILE:ROW, the first row being 1."""
    import pyarrow
    import pyarrow.parquet
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"dataset {name!r} cannot be read as Parquet: {error}") from None
    return StoredRows(len(table), lambda i: table.slice(i, 1).to_pylist()[0], lambda i: f"{name}:{i + 1}")


def read_hugging_face(path: Path, dataset: DatasetConfig) -> StoredRows:
    """A folder written by save_to_disk, or whatever load_dataset takes: a folder of data files or a name on the hub.

    `options` go to load_dataset, e.g. {name: main} for a dataset with several configurations. Labels are NAME/SPLIT:INDEX, from 0.
    """
    import datasets
    offline = "" if path.exists() or dataset.path in FILE_BUILDERS else use_cache_if_unreachable()
    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path) if path.is_dir() else dataset.path, **dataset.options)
    except (OSError, ValueError, TypeError) as error:   # not found, no network, unknown configuration or option
        raise ConfigError(f"dataset {dataset.path!r}: neither a file (.jsonl, .parquet), nor a folder or name that the datasets library could load: {error}{offline}") from None
    if isinstance(data, datasets.DatasetDict):
        if dataset.split not in data:
            raise ConfigError(f"dataset {dataset.path!r} has no split {dataset.split!r}{closest(dataset.split, data)}; its splits: {', '.join(data)}")
        data = data[dataset.split]
    return StoredRows(len(data), lambda i: data[i], lambda i: f"{dataset.path}/{dataset.split}:{i}")
