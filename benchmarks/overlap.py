"""Step time at staleness 0, 1 and 2 with the rollout engine and the learner on a core each: from 1
on the longer side alone should set the pace.

    python benchmarks/overlap.py [--workload w4] [--steps 8] [--prompts 32] [--rounds 2]

Real stack with cluster.pin_cores: the engine has the first `--threads` cores for itself, the
learner the next ones; the driver and the reward process stay free, and use the same cores where
there are no others. The bound is max(rollout, learn) where each is measured alone, at staleness 0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import yaml
from report import emit, spread
from step import HERE, config
from workloads import WORKLOADS, make_model, write_data

from tandem.engine.core.files import read_jsonl


def run(args, folder: Path, staleness: int) -> dict[str, list[float]]:
    tree = config(args, "cluster", args.dtype, "grpo", folder)
    tree["cluster"]["pin_cores"] = True
    tree["rollout"] |= {"staleness": staleness, "prompts_per_step": args.prompts}
    tree["run"] |= {"name": f"staleness-{staleness}", "steps": args.warm + args.steps + staleness}
    place = folder / "runs" / tree["run"]["name"]
    shutil.rmtree(place, ignore_errors=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tandem.launch.cli", "train", str(folder / "config.yaml")],
            stdout=out,
            stderr=out,
            cwd=HERE,
        )
        try:
            process.wait(timeout=args.timeout)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        raise RuntimeError((folder / "out.txt").read_text()[-3000:])
    # the last `staleness` steps have nothing left to roll out beside them
    lines = [line for line in read_jsonl(place / "metrics.jsonl") if "time/step" in line][
        args.warm : args.warm + args.steps
    ]
    return {
        key: [line[key] for line in lines]
        for key in (
            "time/step",
            "time/rollout",
            "time/learn",
            "time/sync",
            "rollout/idle",
            "learner/idle",
        )
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w4")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--prompts", type=int, default=32, help="per step: more of them lengthen both sides"
    )
    for name, value in (
        ("steps", 8),
        ("rounds", 2),
        ("threads", 1),
        ("warm", 2),
        ("micro-batch-tokens", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.set_defaults(compile=False)
    parser.add_argument("--timeout", type=float, default=600.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    found: dict[int, dict[str, list[float]]] = {s: {} for s in (0, 1, 2)}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(args.workload, folder)
        make_model(folder / "model")
        for _ in range(args.rounds):
            for staleness, results in found.items():
                for key, values in run(args, folder, staleness).items():
                    results.setdefault(key, []).extend(values)
    middle = {
        s: {key: median(values) for key, values in results.items()} for s, results in found.items()
    }
    bound = max(middle[0]["time/rollout"], middle[0]["time/learn"])
    ratios = {s: middle[s]["time/step"] / bound for s in middle}
    emit(
        "overlap",
        {
            "workload": args.workload,
            "prompts": args.prompts,
            "dtype": args.dtype,
            "bound": bound,
            "ratio": ratios,
            "median": middle,
            "steps": {s: results["time/step"] for s, results in found.items()},
        },
        (
            f"rollout alone {middle[0]['time/rollout']:.2f} s, learning alone "
            f"{middle[0]['time/learn']:.2f} s; "
        )
        + "; ".join(
            f"staleness {s}: step {spread(found[s]['time/step'])} s, {ratios[s]:.2f} of the "
            f"longer side, idle rollout {middle[s]['rollout/idle']:.2f} "
            f"learner {middle[s]['learner/idle']:.2f}"
            for s in found
        )
        + " (goal from 1 on: 1.10)",
        args.out,
    )


if __name__ == "__main__":
    main()
