"""Small files that outlive a crash: written whole or not at all, and read in whatever state they
were left.

A power cut or a full disk leaves files empty, cut, or filled with NUL bytes. So nothing is
rewritten in place, and a reader of JSONL says which lines it left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tandem.engine.core.errors import ConfigError

SHOWN = 40  # bytes of a bad line that its error shows


class TornFile(ValueError):
    """A file is not what was written to it; the text names it."""


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Put `content` at `path`: a reader, and a process that starts after a crash, finds the old
    content or the new, never a part.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """fsync of a file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_json(path: str | Path) -> Any:
    """The value in a JSON file.

    Raises TornFile if it holds none, FileNotFoundError if there is no file.
    """
    data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise TornFile(f"{path} is damaged, no JSON ({len(data)} bytes): {error}") from None


def keep_aside(path: Path) -> Path:
    """Give a damaged file another name beside its own, so that nothing of it is lost; returns the
    name.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged_{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


@dataclass(frozen=True)
class Line:
    """One line of a JSONL file: its bytes from `start` to `end`, and its object or what is wrong
    with it.
    """

    start: int
    end: int
    record: dict[str, Any] | None
    fault: str = ""


def scan_jsonl(path: str | Path, expected: Callable[[dict], bool] = bool) -> Iterator[Line]:
    """The lines of a file that may not exist; a last line without its newline was torn by a crash
    and is left out.

    A line without an object, or with one that is not `expected`, has a fault that names file and
    line.
    """
    if not Path(path).exists():
        return
    end = 0
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            if not data.endswith(b"\n"):
                return
            start, end = end, end + len(data)
            record = parse(data)
            if record is None or not expected(record):
                shown = repr(data[:SHOWN])[1:]
                fault = f"{len(data)} bytes that begin with {shown}"
                yield Line(start, end, None, f"{path}:{number}: damaged line left out, {fault}")
            else:
                yield Line(start, end, record)


def parse(data: bytes) -> dict[str, Any] | None:
    """The object of a line, None where there is none."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(
    path: str | Path, report: Callable[[str], None] | None = None
) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file.

    `report` is told of every damaged line; without it such a line is a ConfigError.
    """
    for line in scan_jsonl(path):
        if line.record is not None:
            yield line.record
        elif report is not None:
            report(line.fault)
        else:
            fault = line.fault.replace("damaged line left out", "damaged line")
            raise ConfigError(f"{fault}; expected one JSON object")


def cut_jsonl(
    path: Path,
    expected: Callable[[dict], bool],
    beyond: Callable[[dict], bool],
    report: Callable[[str], None],
) -> None:
    """Cut off the first line whose object is `beyond`, and all after it.

    Damaged lines before that move to FILE.damaged and are reported, a torn last line goes.
    """
    kept: list[tuple[int, int]] = []
    damaged: list[tuple[int, int]] = []
    end = 0
    for line in scan_jsonl(path, expected):
        if line.record is None:
            damaged.append((line.start, line.end))
            report(line.fault)
            continue
        if beyond(line.record):
            break
        kept.append((line.start, line.end))
        end = line.end
    if damaged:
        move_damaged(path, kept, damaged)
    elif path.exists():
        os.truncate(path, end)


def move_damaged(path: Path, kept: list[tuple[int, int]], damaged: list[tuple[int, int]]) -> None:
    """Leave the `kept` parts (first byte, byte behind the last) in a file, and append the `damaged`
    ones to FILE.damaged.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(path, "rb") as old, open(tmp, "wb") as new, open(f"{path}.damaged", "ab") as aside:
        for target, parts in ((aside, damaged), (new, kept)):
            for start, end in parts:
                old.seek(start)
                target.write(old.read(end - start))
            target.flush()
            os.fsync(target.fileno())
    os.replace(tmp, path)


def end_last_line(path: Path) -> None:
    """Give a file whose last line was torn the newline that it lacks, so that what is appended
    stands apart from it.
    """
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
