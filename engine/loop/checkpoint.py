"""Checkpoints that are complete or ignored.

A checkpoint is a folder `step_N`: N optimizer steps are done. It is written as `tmp_step_N`, every
file is flushed to disk, MANIFEST.json with size and digest of every file comes last, and only then
is the folder renamed; older checkpoints are pruned after that, never before. So at every instant
the newest complete checkpoint is on disk under a name that `latest` looks at:

    tmp_step_N      being written, or left over by a crash      never read, removed by the next
                    writer
    step_N          complete, if it agrees with its manifest
    old_step_N      the former step_N while a new one takes its name: read where there is no good
                    step_N
    trash_step_N    being deleted                               never read

One process writes to a folder; any number may read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tandem.engine.core.errors import CheckpointError
from tandem.engine.core.files import sync_to_disk
from tandem.engine.loop import disk

MANIFEST = "MANIFEST.json"


class Found(NamedTuple):
    """A complete checkpoint."""

    step: int
    folder: Path


class Checkpoints:
    """The checkpoints of one run.

    `keep`: how many to leave on disk; `report` is called with a line about every checkpoint that is
    passed over. `facts` about the run, in JSON's types, go into every manifest: its id, config, and
    digests of what it reads.
    """

    def __init__(self, folder: str | Path, keep: int, report: Callable[[str], None] = print):
        self.folder, self.keep, self.report = Path(folder), keep, report
        self.facts: dict[str, Any] = {}

    @contextlib.contextmanager
    def write(self, step: int) -> Iterator[Path]:
        """Gives a folder to fill; when the block ends, its content is checkpoint `step`.

        If the block or the disk fails, the folder is removed, the error goes on, and the
        checkpoints before it are as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        final = self.folder / f"step_{step}"
        tmp = self.folder / f"tmp_step_{step}"
        old = self.folder / f"old_step_{step}"
        tmp.mkdir()
        try:
            yield tmp
            seal(tmp, step, self.facts)
        except BaseException as error:
            told = None
            if isinstance(error, Exception):
                before = [found.folder for found in self._named("step")]
                told = disk.checkpoint_failed(error, tmp, step, before)
            shutil.rmtree(tmp, ignore_errors=True)
            if told is not None:
                raise told from error
            error.add_note(
                f"checkpoint {step} in {self.folder} was not written; the checkpoints before "
                "it are intact"
            )
            raise
        if final.exists():
            final.rename(old)
        tmp.rename(final)
        sync_to_disk(self.folder)
        self.clean()
        for step_before, path in self._named("step")[self.keep :]:
            if step_before < step:
                path.rename(self.folder / f"trash_{path.name}")
        self.clean()

    def latest(self) -> Found | None:
        """The newest complete checkpoint. Every file of it has been read and compared with the
        manifest.
        """
        candidates = [*self._named("step"), *self._named("old_step")]
        # sorted() is stable: of one step, step_N comes before old_step_N
        for found in sorted(candidates, key=lambda one: one.step, reverse=True):
            try:
                verify(found.folder)
                return found
            except CheckpointError as error:
                self.report(f"passed over a checkpoint: {error}")
        return None

    def clean(self) -> None:
        """Remove what a crashed writer left over.

        Only for the process that writes to this folder; `write` does it too.
        """
        for step, path in self._named("old_step"):
            final = self.folder / f"step_{step}"
            if final.exists():
                path.rename(self.folder / f"trash_step_{step}")
            else:
                path.rename(final)
        for _, path in self._named("tmp_step") + self._named("trash_step"):
            shutil.rmtree(path)

    def _named(self, prefix: str) -> list[Found]:
        """Every `prefix_N`, newest first."""
        if not self.folder.is_dir():
            return []
        found = []
        for path in self.folder.iterdir():
            match = re.fullmatch(rf"{prefix}_(\d+)", path.name)
            if match:
                found.append(Found(int(match[1]), path))
        return sorted(found, reverse=True)


def seal(folder: Path, step: int, facts: dict[str, Any] | None = None) -> None:
    """Flush every file of `folder` to disk and write the manifest, last."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(digest, files))
        list(pool.map(sync_to_disk, files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "blake2b": d}
        for path, d in zip(files, digests, strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({"format": 1, "step": step, "run": facts or {}, "files": entries}, indent=1)
    )
    sync_to_disk(manifest)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_to_disk(path)


def manifest_facts(path: Path) -> dict[str, Any] | None:
    """The facts about the run in a checkpoint's manifest; None if it cannot be read, or is of a
    version that wrote none.
    """
    try:
        facts = json.loads((path / MANIFEST).read_bytes())["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if isinstance(facts, dict) else None


def verify(path: str | Path) -> None:
    """Compare every file of a checkpoint with the manifest.

    Raises CheckpointError that names the file, what was found and what was expected.
    """
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        step, files = manifest["step"], manifest["files"]
        sizes = {name: entry["size"] for name, entry in files.items()}
        digests = {name: entry["blake2b"] for name, entry in files.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was not written to the end") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error!r})") from None
    if not path.name.endswith(f"step_{step}"):
        raise CheckpointError(f"{path} holds the manifest of step {step}")
    for name, size in sizes.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} lacks {name}, which its manifest lists")
        found = (path / name).stat().st_size
        if found != size:
            raise CheckpointError(f"{path / name} has {found} bytes, its manifest says {size}")
    with ThreadPoolExecutor() as pool:
        present = pool.map(digest, [path / name for name in digests])
        for (name, stated), found in zip(digests.items(), present, strict=True):
            if found != stated:
                raise CheckpointError(
                    f"{path / name} has digest {found[:12]}..., its manifest says "
                    f"{stated[:12]}...: its content was changed"
                )


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
