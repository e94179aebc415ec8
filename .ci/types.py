"""pyright's errors per room against the committed counts in types.json: none may grow.

    python .ci/types.py VIEW [--write]

VIEW is a folder in which the rooms stand as one package (see .ci/lint). `--write` commits to the
present counts. A room that has fewer errors than its count fails too, so that counts only shrink.
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


def check(view: str) -> list[dict]:
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


def room_of(file: str) -> str:
    """`engine/core` for engine/core/types.py, `algorithms` for everything in algorithms."""
    parts = Path(file).resolve().relative_to(ROOT).parts
    if parts[0] == "engine" and len(parts) > 2:
        return f"engine/{parts[1]}"
    return parts[0]


def main() -> int:
    errors = check(sys.argv[1])
    counts = Counter(room_of(item["file"]) for item in errors)
    if "--write" in sys.argv:
        BASELINE.write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
        return 0
    allowed = json.loads(BASELINE.read_text())
    rooms = sorted(counts.keys() | allowed.keys())
    changed = [room for room in rooms if counts[room] != allowed.get(room, 0)]
    for room in changed:
        print(f"types: {room} has {counts[room]} errors, types.json says {allowed.get(room, 0)}")
    for item in errors:
        if counts[room_of(item["file"])] > allowed.get(room_of(item["file"]), 0):
            line = item["range"]["start"]["line"] + 1
            print(f"  {item['file']}:{line}: {item['message'].splitlines()[0]}")
    if changed:
        print("types: fewer errors? `make types` writes the new counts")
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main())
