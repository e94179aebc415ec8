"""Rows that the datasets library reads: what save_to_disk wrote, folders of files, names on a hub.

The library casts what does not fit, and takes the commonest kind of file where a folder has
several. What would be lost or changed in this way is a ConfigError here.
"""

from __future__ import annotations

import re
from collections import deque
from pathlib import Path
from typing import Any

from tandem.engine.config.paths import FILE_BUILDERS, shown
from tandem.engine.config.schema import DatasetConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.foreign import message
from tandem.engine.core.hub import use_cache_if_unreachable
from tandem.engine.core.text import closest
from tandem.engine.data.json_rows import json_lines

KINDS = {
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".parquet": "Parquet",
    ".csv": "CSV",
    ".tsv": "CSV",
    ".arrow": "Arrow",
}
JSON_LINES = (".jsonl", ".ndjson")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CHOOSE = "name one file as the path, or choose with `options: {data_files: PATTERN}`"
CAUSES = 3  # errors behind an error that are shown
CAUSE_CHARACTERS = 800  # of each


class LibraryRows:
    """A dataset of the library, with plain dicts as rows. Labels are NAME/SPLIT:INDEX, from 0."""

    def __init__(self, data: Any, name: str):
        self.data = data
        self.name = name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            return self.data[number]
        except IndexError:
            raise
        except Exception as error:  # a column that cannot be decoded: an image, sound
            raise ConfigError(
                f"{self.label(number)}: the row cannot be read: {causes(error)}"
            ) from None

    def label(self, number: int) -> str:
        return f"{self.name}:{number}"


def read_library(path: Path, dataset: DatasetConfig) -> LibraryRows:
    """`options` go to load_dataset, e.g. {name: main} of a dataset with several configurations."""
    import datasets

    saved = (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()
    files = [] if saved else data_files(path, dataset)
    refuse_several_kinds(files, dataset)
    refuse_unlike_types(files, dataset)
    known_here = path.exists() or dataset.path in FILE_BUILDERS
    offline = "" if known_here else use_cache_if_unreachable()
    try:
        if saved:
            data = datasets.load_from_disk(str(path))
        else:
            source = str(path) if path.is_dir() else dataset.path
            data = datasets.load_dataset(source, **dataset.options)
    except Exception as error:  # not found, no network, unknown option, files that do not fit
        read_lines(files)
        raise ConfigError(
            f"dataset {dataset.path!r}: neither a file (.jsonl, .json, .parquet), "
            "nor a folder or name that the datasets library could load: "
            f"{causes(error)}{offline}{unlike_columns(files)}"
        ) from None
    if isinstance(data, (datasets.IterableDataset, datasets.IterableDatasetDict)):
        raise ConfigError(
            f"dataset {dataset.path!r}: options.streaming is set, but rows that are streamed "
            "have no numbers, by which a run shuffles and resumes; leave it out"
        )
    if isinstance(data, datasets.DatasetDict):
        if dataset.split not in data:
            splits = [str(name) for name in data]
            raise ConfigError(
                f"dataset {dataset.path!r} has no split {dataset.split!r}"
                f"{closest(dataset.split, splits)}; its splits: {', '.join(splits)}"
            )
        data = data[dataset.split]
    elif "split" not in dataset.options:
        refuse_other_split(data.split, dataset)
    return LibraryRows(data, f"{dataset.path}/{dataset.split}")


def refuse_other_split(found: Any, dataset: DatasetConfig) -> None:
    """found: which split it was that was saved alone, or None where that is not known."""
    names = re.findall(r"[^\W\d][\w.-]*", str(found)) if found is not None else []
    if names and dataset.split not in names:
        raise ConfigError(
            f"dataset {dataset.path!r} holds the split {str(found)!r} alone, and the "
            f"split {dataset.split!r} is asked for; set `split: {names[0]}` of the "
            "dataset if it is the one that you want"
        )


def data_files(folder: Path, dataset: DatasetConfig) -> list[Path]:
    """The files of a folder that hold rows; none where options or the folder's README choose."""
    if not folder.is_dir() or {"data_files", "data_dir"} & set(dataset.options):
        return []
    readme = folder / "README.md"
    if readme.is_file() and "data_files" in readme.read_text(encoding="utf-8", errors="replace"):
        return []
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "__")) for part in parts)
        if path.suffix in KINDS and path.name not in DESCRIPTIONS and not hidden and path.is_file():
            found.append(path)
    return found


def refuse_several_kinds(files: list[Path], dataset: DatasetConfig) -> None:
    first: dict[str, Path] = {}
    for path in files:
        first.setdefault(KINDS[path.suffix], path)
    if len(first) > 1:
        examples = ", ".join(f"{kind} ({path.name})" for kind, path in first.items())
        raise ConfigError(
            f"dataset {dataset.path!r}: the folder holds files of several kinds, "
            f"{examples}, of which only one would be read; {CHOOSE}"
        )


def refuse_unlike_types(files: list[Path], dataset: DatasetConfig) -> None:
    """Raise ConfigError if one file has messages where another has text: the library would make
    text of them. The first row of each file is looked at."""
    for name in dict.fromkeys((dataset.prompt, dataset.response)):
        if name is None:
            continue
        seen: dict[type, Path] = {}
        for path in files:
            value = first_row(path).get(name)
            if value is not None:
                seen.setdefault(type(value), path)
        if str in seen and len(seen) > 1:
            found = ", ".join(f"{kind.__name__} in {path.name}" for kind, path in seen.items())
            raise ConfigError(
                f"dataset {dataset.path!r}: column {name!r} is {found}, which the "
                f"datasets library would turn into text; {CHOOSE}"
            )


def read_lines(files: list[Path]) -> None:
    """Raise the ConfigError that names the first line which is no row, if there is one."""
    for path in files:
        if path.suffix in JSON_LINES:
            deque(json_lines(path, shown(path)), maxlen=0)


def unlike_columns(files: list[Path]) -> str:
    """' (...)' with the columns of the first two files that differ in them, or ''."""
    first: dict[str, str] = {}  # {columns: name of the first file that has them}
    for path in files:
        columns = ", ".join(first_row(path))
        if columns:
            first.setdefault(columns, path.name)
        if len(first) == 2:
            (a, one), (b, other) = first.items()
            return f" ({one} has the columns {a}, {other} has {b}; {CHOOSE})"
    return ""


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a JSONL file; {} for other files, and for what is no row."""
    if path.suffix not in JSON_LINES:
        return {}
    try:
        for _, row in json_lines(path, path.name):
            return row
    except (OSError, ConfigError):
        return {}
    return {}


def causes(error: BaseException | None) -> str:
    """An error and what is behind it, in one line."""
    parts = []
    while error is not None and len(parts) < CAUSES:
        text = " ".join(str(error).split())
        parts.append(message(f"{type(error).__name__}: {text}", CAUSE_CHARACTERS))
        error = error.__cause__
    return "; because of ".join(parts)
