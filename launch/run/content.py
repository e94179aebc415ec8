"""What a run reads, by content: the same text whatever the folder it lies in, another one when
somebody edits it.

A whole file where all of it is read anyway; rows or parts of it where that would cost too much.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tandem.engine.config.paths import OBJECT_IN_FILE
from tandem.engine.config.schema import Config, DatasetConfig
from tandem.engine.data.tasks import UNLIMITED
from tandem.engine.model.resolve import resolve_model

WHOLE_FILES = (".jsonl", ".parquet")
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
ROWS = 10_000  # of a dataset that is no file, evenly spaced
UNLIMITED_ROWS = 32  # of rows without end, the first
LARGE = 4 << 20  # bytes; of a larger file of a model the size and both ends count
END = 1 << 20


def contents(config: Config, sources: dict[str, Any], model_path: str) -> dict[str, str]:
    """Digests by config key. sources: {key of a dataset: PromptSource or ExpertSource, or None
    where the method needs none}.
    """
    found = {"model.path": model_digest(model_path)}
    for name, other in config.models.items():
        if other.path:
            folder = resolve_model(replace(config.model, path=other.path))
            found[f"models.{name}.path"] = model_digest(folder)
    if config.model.tokenizer:
        found["model.tokenizer"] = model_digest(config.model.tokenizer)
    if config.rollout.record:
        found["rollout.record"] = file_digest(config.rollout.record)
    for key, source in sources.items():
        # recorded prompts have none, and their file is rollout.record
        if source is not None and hasattr(source, "rows"):
            digest = data_digest(source.dataset, source.rows, len(source))
            scores = source.dataset.scores
            if scores is not None:
                digest += f", scores {file_digest(scores)}"
            found[key] = digest
    return {key: digest for key, digest in found.items() if digest}


def data_digest(dataset: DatasetConfig, rows: Any, length: int) -> str:
    """length: rows of an epoch."""
    if dataset.path.endswith(WHOLE_FILES) and Path(dataset.path).is_file():
        return f"{file_digest(dataset.path)} {length} rows"
    if length == UNLIMITED:
        digest = rows_digest(rows, range(UNLIMITED_ROWS))
        return f"{digest} rows without end"
    distance = -(-length // ROWS)  # rounded up
    digest = rows_digest(rows, range(0, length, distance))
    return f"{digest} {length} rows"


def rows_digest(rows: Any, numbers: Iterable[int]) -> str:
    text = blake2b()
    for number in numbers:
        row = json.dumps(rows[number], default=kind, skipkeys=True)
        text.update(row.encode())
    return text.hexdigest()


def kind(value: Any) -> str:
    """In the place of what JSON does not know, such as an image."""
    return type(value).__name__


def file_digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, blake2b).hexdigest()


def blake2b():
    return hashlib.blake2b(digest_size=16)


def model_digest(folder: str) -> str:
    """'' for a name on a hub."""
    if not Path(folder).is_dir():
        return ""
    text = blake2b()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix not in MODEL_FILES or not path.is_file():
            continue
        size = path.stat().st_size
        text.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if size <= LARGE:
                text.update(file.read(size))
            else:
                text.update(file.read(END))
                file.seek(size - END)
                text.update(file.read())
    return text.hexdigest()


def code_digests(value: Any) -> dict[str, str]:
    """{FILE.py:NAME: digest of the file} for every such text in a section of a config."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        found: dict[str, str] = {}
        for entry in value:
            found.update(code_digests(entry))
        return found
    if not isinstance(value, str):
        return {}
    match = OBJECT_IN_FILE.fullmatch(value)
    if match is None:
        return {}
    file = Path(match["file"])
    if not file.is_file():
        return {}
    return {value: file_digest(file)}
