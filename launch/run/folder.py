"""The folder of a run: whose it is, what a run writes into it, and what a start finds there.

run.json marks it: {"run": a random id, "written": time, "model": whether model/ is this run's,
"format": 1}. The id also stands in every checkpoint's manifest, in environment.json, in the first
line of config.yaml and in the start events, so that files of two runs can be told apart.

A start owns the folder (`folder_lock`) before it writes anything. It begins in a folder that is
absent or empty, or that an earlier start left before anything was trained; it goes on from a
checkpoint with run.resume=true or auto; with auto it starts over where there is no checkpoint, and
keeps what the earlier attempt wrote in attempt_N. All else is refused: what it did not write itself
is not touched.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.files import TornFile, read_json, write_atomic
from tandem.engine.core.folder_lock import LOCK, FolderLock, owned
from tandem.engine.loop.checkpoint import MANIFEST, manifest_facts

MARK = "run.json"
WRITTEN_AT_START = (
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "rollouts.jsonl",
    "events.jsonl",
)
OURS = (
    *WRITTEN_AT_START,
    "configs",
    "logs",
    "error.log",
    "bad_steps",
    "checkpoints",
    "model",
    "tensorboard",
    "wandb",
    "wandb_id",
    "ray_session",
)  # what a run writes, apart from MARK and LOCK
CHECKPOINT = re.compile(r"(old_)?step_\d+")


@dataclass(frozen=True)
class RunFolder:
    """A folder that this process owns."""

    path: Path
    run_id: str
    lock: FolderLock
    resumes: bool  # from one of the checkpoints there
    notes: tuple[str, ...]  # what the user should know of how it was found


@contextmanager
def opened(config: Config) -> Iterator[RunFolder]:
    """Own the run's folder for the block.

    Raises ConfigError if it is in use, holds something else, or holds a run and run.resume does not
    say what to do with that; nothing was written then.
    """
    path = Path(config.run.dir) / config.run.name
    check_before(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run folder {path} (run.dir/run.name) cannot be made: {error}") from None
    notes: list[str] = []
    with owned(path, notes.append) as lock:
        check_before(path, config)
        resumes = decide(path, config)
        if is_used(path) and not resumes:
            start_over(path, notes.append)
        run_id = identify(path, resumes, notes.append)
        yield RunFolder(path, run_id, lock, resumes, tuple(notes))


def check_before(path: Path, config: Config) -> None:
    """What needs no ownership.

    Raises ConfigError if the folder is somebody else's, or has nothing to resume from.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(
            f"run folder {path} (run.dir/run.name) is a file; choose another run.name"
        )
    try:
        present = sorted(os.listdir(path)) if path.exists() else []
    except OSError as error:
        raise ConfigError(f"run folder {path} (run.dir/run.name) cannot be read: {error}") from None
    foreign = []
    if not is_run(path):
        others = [name for name in present if name != LOCK]
        foreign = [name for name in others if not name.startswith(".")]
    clash = [name for name in foreign if name in OURS]
    if clash or (foreign and not config.run.beside_files):
        shown = ", ".join((clash or foreign)[:5])
        allow = "" if clash else ", or set run.beside_files=true to write beside those files"
        raise ConfigError(
            f"run folder {path} (run.dir/run.name) is not empty and no run of Tandem (no "
            f"{MARK}); it holds {shown}. "
            f"Choose another run.name or run.dir{allow}"
        )
    if config.run.resume is True and not is_run(path):
        raise nothing_to_resume(path)


def nothing_to_resume(path: Path) -> ConfigError:
    return ConfigError(
        f"run.resume is true, but {path / 'checkpoints'} holds no complete checkpoint; set "
        "run.resume=auto, which "
        "goes on where there is one and starts from the beginning where there is none"
    )


def decide(path: Path, config: Config) -> bool:
    """Whether to resume from a checkpoint.

    Raises ConfigError if the folder is used and the config does not say what to do.
    """
    found = checkpoints(path)
    if config.run.resume is False:
        if is_used(path):
            what = (
                "run.resume=true to continue it"
                if found
                else "run.resume=auto to start over (it has no checkpoint; its files are kept)"
            )
            raise ConfigError(
                f"run folder {path} already holds a run; set {what}, choose another "
                "run.name, or delete it"
            )
        return False
    if config.run.resume is True and not found:
        raise nothing_to_resume(path)
    if not found and (path / "model").exists():
        raise ConfigError(
            f"run folder {path} holds a saved model but no checkpoint, so run.resume=auto "
            "cannot tell whether that run "
            "is to be done again; choose another run.name, or delete the folder"
        )
    return bool(found)


def is_run(path: Path) -> bool:
    """Whether Tandem made this folder: by its mark, or by what versions without one left."""
    if (path / MARK).exists():
        return True
    for step in checkpoints(path):
        if (step / MANIFEST).exists():
            return True
    return all((path / name).exists() for name in WRITTEN_AT_START)


def is_used(path: Path) -> bool:
    """Whether the run got so far that something would be lost if another began here."""
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        file = path / name
        if file.exists() and file.stat().st_size:
            return True
    return bool(checkpoints(path)) or (path / "model").exists()


def checkpoints(path: Path) -> list[Path]:
    """The folders of its checkpoints, damaged ones too, in no order."""
    folder = path / "checkpoints"
    if not folder.is_dir():
        return []
    return [step for step in folder.iterdir() if CHECKPOINT.fullmatch(step.name)]


def identify(path: Path, resumes: bool, say: Callable[[str], None]) -> str:
    """The run's id; written to run.json where that is missing.

    Raises ConfigError if checkpoints of another run lie there.
    """
    stated = read_mark(path, say)
    ids = {}
    for step in checkpoints(path):
        found = manifest_id(step)
        if found is not None:
            ids.setdefault(found, step)
    run_id = stated or next(iter(ids), None) or secrets.token_hex(8)
    for other, step in ids.items():
        if other != run_id:
            source = (
                f"is run {run_id} ({path / MARK})"
                if stated
                else f"also holds {ids[run_id].name} of run {run_id}"
            )
            raise ConfigError(
                f"{step} is a checkpoint of run {other}, but {path} {source}; move the "
                "checkpoint to a folder of its own, "
                "or take away what does not belong to it"
            )
    if stated is None:
        write_mark(path, run_id)
    return run_id


def read_mark(path: Path, say: Callable[[str], None]) -> str | None:
    try:
        value = read_json(path / MARK)
        if isinstance(value, dict) and isinstance(value.get("run"), str):
            return value["run"]
        fault = f"{path / MARK} names no run"
    except FileNotFoundError:
        return None
    except TornFile as error:
        fault = str(error)
    say(f"{fault}; written anew, with the id that the checkpoints have if there are any")
    return None


def manifest_id(checkpoint: Path) -> str | None:
    """None for a checkpoint of a version without ids, or one that cannot be read."""
    found = (manifest_facts(checkpoint) or {}).get("id")
    return found if isinstance(found, str) else None


def start_over(path: Path, say: Callable[[str], None]) -> None:
    """Move what an earlier attempt wrote into attempt_N.

    Its mark moves last: a crash in between leaves a folder of a run. checkpoints/ stays: there is
    none in it.
    """
    number = 1
    while (aside := path / f"attempt_{number}").exists():
        number += 1
    aside.mkdir()
    for name in OURS:
        if name != "checkpoints" and os.path.lexists(path / name):
            (path / name).rename(aside / name)
    mark = path / MARK
    if mark.exists():
        mark.rename(aside / MARK)
    say(
        f"{path} holds a run that ended before its first checkpoint: started over, its files "
        f"are in {aside.name}/"
    )


@contextmanager
def replaced_model(folder: RunFolder) -> Iterator[Path]:
    """Gives a folder to save the final model in, which then becomes model/, complete or not at all.

    run.json says once this run has written one. A model/ that it did not write is kept as model_N.
    """
    final = folder.path / "model"
    tmp = folder.path / f".model.{folder.run_id}.new"
    old = folder.path / f".model.{folder.run_id}.old"
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    try:
        yield tmp
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    if os.path.lexists(final):
        ours = wrote_model(folder.path)
        final.rename(old if ours else free_name(final))
    tmp.rename(final)
    write_mark(folder.path, folder.run_id, model=True)
    shutil.rmtree(old, ignore_errors=True)


def forget_model(folder: RunFolder) -> bool:
    """Remove the final model that an earlier end of this run left: the run is longer now, and its
    newest checkpoint is the model. Returns whether there was one.
    """
    if not wrote_model(folder.path):
        return False
    write_mark(folder.path, folder.run_id)
    shutil.rmtree(folder.path / "model", ignore_errors=True)
    return True


def wrote_model(path: Path) -> bool:
    """Whether model/ is known to be the run's."""
    try:
        mark = read_json(path / MARK)
    except (TornFile, OSError):
        return False
    return isinstance(mark, dict) and mark.get("model") is True


def write_mark(path: Path, run_id: str, model: bool = False) -> None:
    """run.json: whose folder this is, and whether model/ is the run's."""
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    mark = {"run": run_id, "written": created, "model": model, "format": 1}
    write_atomic(path / MARK, json.dumps(mark, indent=1) + "\n")


def free_name(path: Path) -> Path:
    number = 1
    while os.path.lexists(other := path.with_name(f"{path.name}_{number}")):
        number += 1
    return other


def new_folder(parent: str | Path, name: str) -> str:
    """Make an empty folder NAME or NAME-2, -3, ... that was not there; returns its name.

    Raises ConfigError.
    """
    number = 1
    found = name
    while True:
        folder = Path(parent, found)
        try:
            Path(parent).mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return found
        except FileExistsError:
            number += 1
            found = f"{name}-{number}"
        except OSError as error:
            raise ConfigError(
                f"run folder {folder} (run.dir/run.name) cannot be made: {error}"
            ) from None
