"""The type checker's errors per room against the committed counts in types.json.

    python .ci/count_types.py VIEW [--write]

VIEW is a folder in which the rooms stand as one package (see .ci/lint). The counts only shrink:
more errors than committed fail, fewer fail too until `--write` (`make types`) commits to them, and
`--write` refuses to raise one. Rooms in CLEAN have no errors at all.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BASELINE = Path(__file__).with_name("types.json")
ROOMS = ("engine", "algorithms", "rollout", "launch")
CLEAN = ("algorithms", "engine/core", "engine/config")


def find_errors(view: str) -> list[dict]:
    """The diagnostics that are errors."""
    config = {
        "include": [str(ROOT / room) for room in ROOMS],
        "extraPaths": [view],
        "typeCheckingMode": "basic",
        "pythonVersion": "3.11",
        "reportMissingImports": False,
        "reportMissingModuleSource": False,
    }
    path = Path(view) / "pyrightconfig.json"
    path.write_text(json.dumps(config))
    checker = Path(sys.executable).with_name("basedpyright")
    python = ROOT / ".venv" / "bin" / "python"
    command = [checker, "--project", path, "--pythonpath", python, "--outputjson"]
    result = subprocess.run(command, capture_output=True, text=True)
    try:
        found = json.loads(result.stdout)["generalDiagnostics"]
    except ValueError:
        sys.exit(f"types: the checker failed: {result.stdout[-500:]}{result.stderr[-500:]}")
    return [item for item in found if item["severity"] == "error"]


def room_of(error: dict) -> str:
    """`engine/core` for engine/core/types.py, `algorithms` for everything in algorithms."""
    parts = Path(error["file"]).resolve().relative_to(ROOT).parts
    if parts[0] == "engine" and len(parts) > 2:
        return f"engine/{parts[1]}"
    return parts[0]


def describe(error: dict) -> str:
    file = Path(error["file"]).resolve().relative_to(ROOT)
    line = error["range"]["start"]["line"] + 1
    return f"  {file}:{line}: {error['message'].splitlines()[0]}"


def main() -> int:
    errors = find_errors(sys.argv[1])
    counts = Counter(room_of(error) for error in errors)
    committed = json.loads(BASELINE.read_text())
    allowed = {room: count for room, count in committed.items() if room not in CLEAN}
    rooms = sorted(counts.keys() | allowed.keys())
    grown = [room for room in rooms if counts[room] > allowed.get(room, 0)]
    shrunk = [room for room in rooms if counts[room] < allowed.get(room, 0)]

    for room in grown:
        print(f"types: {room} has {counts[room]} errors, types.json allows {allowed.get(room, 0)}:")
        for error in errors:
            if room_of(error) == room:
                print(describe(error))
    if grown:
        return 1
    if "--write" in sys.argv:
        BASELINE.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
        return 0
    for room in shrunk:
        print(f"types: {room} has {counts[room]} errors, types.json still {allowed[room]}")
    if shrunk:
        print("types: commit to the fewer errors: make types")
    return int(bool(shrunk))


if __name__ == "__main__":
    sys.exit(main())
