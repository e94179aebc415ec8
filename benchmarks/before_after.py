"""A training step before and after a change: two checkouts, each with its own Python, take turns.

    python benchmarks/before_after.py OLD_CHECKOUT --workload w4 --modes inline cluster --steps 9

OLD_CHECKOUT has an environment of its own in .venv; "new" is the checkout of this file. Both train
on the same model and prompts, forced to the same response length, step by step (turns.py), so that
a busy minute hits both. Reported is the ratio of the medians, new / old, for the whole step and for
its learning part.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from statistics import median

import step
import yaml
from report import emit, limits
from turns import Turn
from workloads import WORKLOADS, make_model, write_data

from tandem.engine.core.files import read_jsonl

NEW = Path(__file__).resolve().parents[1]


def start(args, checkout: Path, name: str, mode: str, folder: Path) -> Turn:
    """Start `tandem train` of a checkout; it stops before its first step."""
    place = folder / name
    place.mkdir()
    config = step.config(args, mode, "float32", "grpo", folder)
    config["run"]["name"] = name
    text = yaml.safe_dump(config).replace(str(NEW / "benchmarks"), str(checkout / "benchmarks"))
    (place / "config.yaml").write_text(text)
    python = checkout / ".venv" / "bin" / "python"
    command = [python, "-m", "tandem.launch.cli", "train", place / "config.yaml", "--debug"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout / "benchmarks"),
        "HF_HUB_OFFLINE": "1",
        "BENCH_TURNS": str(place),
    }
    with open(place / "out.txt", "w") as out:
        return Turn(place, subprocess.Popen(command, stdout=out, stderr=out, env=environment))


def take_turns(turns: dict[str, Turn], steps: int, timeout: float) -> None:
    """Who goes first changes from step to step."""
    for number in range(steps):
        order = list(turns.values())
        if number % 2:
            order.reverse()
        for turn in order:
            turn.grant(number)
            turn.wait(number + 1, timeout)
    for turn in turns.values():
        turn.stop(timeout)


def compare(args, mode: str, folder: Path) -> dict[str, dict[str, list[float]]]:
    """{old | new: seconds of the whole step and of learning, one value per step that counts}."""
    turns: dict[str, Turn] = {}
    try:
        for side, checkout in (("old", Path(args.old).resolve()), ("new", NEW)):
            turns[side] = start(args, checkout, f"{mode}-{side}", mode, folder)
            turns[side].wait(0, args.timeout)
        take_turns(turns, args.warm + args.steps, args.timeout)
    finally:
        for turn in turns.values():
            if turn.process.poll() is None:
                turn.process.terminate()
                turn.process.wait(timeout=60)
    counted = slice(args.warm, args.warm + args.steps)
    found = {}
    for side, turn in turns.items():
        lines = read_jsonl(folder / "runs" / f"{mode}-{side}" / "metrics.jsonl")
        learn = [line["time/learn"] for line in lines if "time/learn" in line]
        found[side] = {"step": turn.seconds()[counted], "learn": learn[counted]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD_CHECKOUT")
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w4")
    parser.add_argument("--modes", nargs="+", default=["inline"], choices=("inline", "cluster"))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warm", type=int, default=step.WARM)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    peak = limits()
    results, ratios = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(args.workload, folder)
        make_model(folder / "model")
        for mode in args.modes:
            found = results[mode] = compare(args, mode, folder)
            for part in ("step", "learn"):
                before, after = median(found["old"][part]), median(found["new"][part])
                ratios[f"{mode} {part}"] = after / before
    text = ", ".join(f"{name} {value:.3f}" for name, value in ratios.items())
    result = {"workload": args.workload, "limits": peak, "ratios": ratios, "seconds": results}
    emit("before_after", result, f"new / old: {text}", args.out)


if __name__ == "__main__":
    main()
