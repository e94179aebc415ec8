"""Seconds from the command to the first trained step, inline and on the real stack, and where they
go.

    python benchmarks/startup.py [--modes inline cluster] [--repeats 3]

Runs `tandem train` on the tiny model for one step, in an empty folder, and watches what the run
leaves behind: its folder (imports, data and config are through), the logs of engine and learner
(Ray is up, their processes run), the first verified weight sync (both are up) and the first line of
metrics.jsonl (a step is trained).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import yaml
from report import emit, spread

GOAL = {"inline": 10, "cluster": 45}
SIGNS = {
    "imports, config, data": "metrics.jsonl",
    "Ray and actor processes": "logs/engine_0.log",
    "engine and learner": "events.jsonl",
    "first step": "metrics.jsonl",
}
UP = re.compile(r"^(\w+) up: (.*)$", re.M)


def config(mode: str) -> dict:
    return {
        "mode": mode,
        "model": {"path": "tandem:tiny"},
        "method": {"name": "chord_mu"},
        "data": {
            "prompts": {"path": "task:sort"},
            "experts": {"path": "task:sort", "options": {"size": 32, "seed": 1}},
            "max_prompt_tokens": 32,
            "max_expert_tokens": 16,
            "experts_per_step": 8,
        },
        "rollout": {
            "prompts_per_step": 8,
            "samples_per_prompt": 8,
            "max_tokens": 12,
            "kv_cache_gib": 0.25,
        },
        "reward": {"functions": ["exact"]},
        "run": {"name": "run", "steps": 1, "save_model": False},
    }


def once(mode: str) -> dict:
    """Seconds of each phase, `total`, and what engine and learner said about their own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "config.yaml").write_text(yaml.safe_dump(config(mode)))
        seen, began = {}, time.perf_counter()
        with open(folder / "out.txt", "w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tandem.launch.cli", "train", "config.yaml"],
                cwd=folder,
                stdout=out,
                stderr=out,
                env=dict(os.environ),
            )
            while process.poll() is None:
                for phase, name in SIGNS.items():
                    file = folder / "runs/run" / name
                    if (
                        phase not in seen
                        and file.exists()
                        and (
                            phase not in ("first step", "engine and learner") or file.stat().st_size
                        )
                    ):
                        seen[phase] = time.perf_counter() - began
                time.sleep(0.01)
        ended = time.perf_counter() - began
        if process.returncode or "first step" not in seen:
            raise RuntimeError(
                "tandem train ended with "
                f"{process.returncode}:\n{(folder / 'out.txt').read_text()[-3000:]}"
            )
        phases, last = {}, 0.0
        for phase, at in seen.items():
            phases[phase], last = at - last, at
        logs = {
            m[1]: m[2]
            for log in sorted((folder / "runs/run/logs").glob("*_0.log"))
            for m in UP.finditer(log.read_text(errors="replace"))
        }
        return {
            "total": seen["first step"],
            "phases": phases,
            "after": ended - seen["first step"],
            "own": logs,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", default=["inline", "cluster"], choices=list(GOAL))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out")
    args = parser.parse_args()
    found = {mode: [] for mode in args.modes}
    for _ in range(args.repeats):
        for mode in args.modes:
            found[mode].append(once(mode))
    for mode, runs in found.items():
        phases = {
            phase: median(run["phases"].get(phase, 0.0) for run in runs)
            for phase in runs[0]["phases"]
        }
        totals = [run["total"] for run in runs]
        emit(
            "startup",
            {
                "mode": mode,
                "seconds": totals,
                "phases": phases,
                "shutdown": median(run["after"] for run in runs),
                "own": runs[-1]["own"],
                "goal": GOAL[mode],
            },
            f"{mode}: first step trained after {spread(totals)} s (goal {GOAL[mode]}): "
            + ", ".join(f"{phase} {value:.1f}" for phase, value in phases.items())
            + f"; then {median(run['after'] for run in runs):.1f} to save and end"
            + "".join(f"; {name}: {what}" for name, what in runs[-1]["own"].items()),
            args.out,
        )


if __name__ == "__main__":
    main()
