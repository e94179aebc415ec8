"""Paths in a config: relative to the folder in which the command was started, resolved once, there.

`resolve_paths` makes them absolute before any code of the user runs, so that nothing depends on the
current folder afterwards. What is no path stays: names on a hub, tandem:tiny, task:NAME,
reasoning_gym:TASK, built-in rewards, methods and backends, package.module:Name.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from tandem.engine.config.secrets import Reference
from tandem.engine.core.errors import ConfigError

DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".arrow", ".txt")
FILE_BUILDERS = (
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
    "xml",
    "webdataset",
    "imagefolder",
    "audiofolder",
)  # datasets that load_dataset makes of the files in its options
OBJECT_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_][\w.]*)", re.DOTALL)


def resolve_paths(config):
    """The config (engine.config.Config) with absolute paths. Raises ConfigError."""
    model, reward = config.model, config.reward
    check_locale(config.run.name, "run.name")
    functions = tuple(code(name, "reward.functions") for name in reward.functions)
    renamed = dict(zip(reward.functions, functions, strict=True))
    options = {renamed.get(name, name): value for name, value in reward.options.items()}
    rollout = config.rollout
    rollout = replace(
        rollout,
        backend=code(rollout.backend, "rollout.backend"),
        backend_options=code_in(rollout.backend_options, "rollout.backend_options"),
        record=rollout.record and absolute(rollout.record, "rollout.record"),
    )
    datasets = {}
    for field in fields(config.data):
        value = getattr(config.data, field.name)
        if hasattr(value, "path") and hasattr(value, "options"):
            datasets[field.name] = dataset(value, f"data.{field.name}")
    sources = {}
    for name, value in config.data.sources.items():
        sources[name] = dataset(value, f"data.sources.{name}")
    models = {}
    for name, value in config.models.items():
        path = name_or_path(value.path, f"models.{name}.path")
        models[name] = replace(value, path=path)
    return replace(
        config,
        models=models,
        model=replace(
            model,
            path=name_or_path(model.path, "model.path"),
            tokenizer=name_or_path(model.tokenizer, "model.tokenizer"),
        ),
        data=replace(config.data, sources=sources, **datasets),
        method=code_in(config.method, "method"),
        reward=replace(reward, functions=functions, options=options),
        rollout=rollout,
        run=replace(config.run, dir=absolute(config.run.dir, "run.dir")),
    )


def dataset(value, key: str):
    """A dataset section whose path, and the files that its options name, are absolute."""
    options = value.options
    if value.path in FILE_BUILDERS:
        options = dict(options)
        for name in ("data_files", "data_dir"):
            if name in options:
                options[name] = files(options[name], f"{key}.options.{name}")
    path = name_or_path(value.path, f"{key}.path", DATA_SUFFIXES)
    scores = value.scores and absolute(value.scores, f"{key}.scores")
    return replace(value, path=path, options=options, scores=scores)


def files(value: Any, key: str) -> Any:
    """data_files of load_dataset: a path or a pattern, a list of them, or a mapping to them."""
    if isinstance(value, dict):
        return {split: files(entry, key) for split, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [files(entry, key) for entry in value]
    if isinstance(value, str) and "://" not in value:
        return absolute(value, key)
    return value


def name_or_path(text: str | None, key: str, suffixes: tuple[str, ...] = ()) -> str | None:
    """Absolute if it looks like a path or is one here; a name on a hub, or empty, stays."""
    if not text or "://" in text or text.startswith(("tandem:", "task:", "reasoning_gym:")):
        return text
    looks = text.startswith((".", "~", os.sep)) or text.endswith(suffixes or ("\0",))
    if looks or exists(text):
        return absolute(text, key)
    return text


def exists(text: str) -> bool:
    try:
        return os.path.exists(text)
    except ValueError:  # a NUL in it
        return False


def code(text: str, key: str) -> str:
    """FILE.py:NAME with an absolute file; anything else stays."""
    match = OBJECT_IN_FILE.fullmatch(text)
    if match is None:
        return text
    return keep_reference(text, f"{absolute(match['file'], key)}:{match['name']}")


def code_in(value: Any, key: str) -> Any:
    """The same for every text in a section of options."""
    if isinstance(value, dict):
        return {name: code_in(entry, f"{key}.{name}") for name, entry in value.items()}
    if isinstance(value, list):
        return [code_in(entry, key) for entry in value]
    return code(value, key) if isinstance(value, str) else value


def absolute(text: str, key: str) -> str:
    """An absolute path with `~` expanded, and without `..` where that names the same place."""
    check_locale(text, key)
    try:
        path = Path(text).expanduser().absolute()
        short = os.path.abspath(path)
        same = os.path.realpath(short) == os.path.realpath(path)
        return keep_reference(text, short if same else str(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{key} is {text!r}, relative to the current folder, which was deleted; "
            "change to a folder that exists"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{key} is {text!r}: {error}") from None


def check_locale(text: str, key: str) -> None:
    """Raise ConfigError if no file can have this name here: the locale C knows ASCII only."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key} is {text!r}, which holds characters that a path cannot have in "
            f"this locale ({sys.getfilesystemencoding()}); set LC_ALL=C.UTF-8 or "
            "PYTHONUTF8=1"
        ) from None


def keep_reference(text: str, resolved: str) -> str:
    if isinstance(text, Reference):
        return Reference(resolved, text.reference)
    return resolved


def shown(path: str | Path) -> str:
    """A path for people and labels: relative to the current folder where it lies in that."""
    try:
        relative = os.path.relpath(path)
    except FileNotFoundError:  # the current folder was deleted
        return str(path)
    if relative.startswith(os.pardir) or os.getcwd() == os.sep:
        return str(path)
    return relative


def shown_code(text: str) -> str:
    """The same for FILE.py:NAME."""
    match = OBJECT_IN_FILE.fullmatch(text)
    if match is None:
        return text
    return f"{shown(match['file'])}:{match['name']}"


@contextmanager
def process_kept() -> Iterator[None]:
    """What the user's code in the block does to the current folder and to sys.argv is undone."""
    arguments = list(sys.argv)
    try:
        folder = os.getcwd()
    except FileNotFoundError:
        folder = None
    try:
        yield
    finally:
        if folder is not None:
            os.chdir(folder)
        sys.argv[:] = arguments
