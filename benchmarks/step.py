"""A whole training step next to TRL's GRPOTrainer: same model, prompts, sample counts, response
lengths, precision and reward, alternating.

    python benchmarks/step.py --workload w4 --peer-python TRLVENV/bin/python [--dtypes float32
    bfloat16] [--modes inline cluster] [--chord] [--steps 5]

Each side is a process of its own (`tandem train`, or peer_trl.py) that stays up, and they take
turns step by step (turns.py). The first `--warm` steps are left out. A step is everything from one
step's begin to the next: rollouts, rewards, learning, weight sync, reports. `--chord` adds a CHORD
step on the same rollouts plus expert rows, compared with the GRPO step at equally many trained
tokens. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import yaml
from report import emit, limits, spread
from turns import Turn
from workloads import WORKLOADS, make_model, write_data

from tandem.engine.core.files import read_jsonl

HERE = Path(__file__).resolve().parent
WARM = 2  # steps that do not count (--warm): first allocations, first compilations


def config(args, mode: str, dtype: str, method: str, folder: Path) -> dict:
    """A workload as a Tandem config: two threads for whoever works, since at staleness 0 engine and
    learner take turns.
    """
    w = WORKLOADS[args.workload]
    inline = mode == "inline"
    experts = (
        {
            "experts": {"path": str(folder / "experts.jsonl"), "response": "response"},
            "experts_per_step": w.experts,
        }
        if method == "chord"
        else {}
    )
    options = {"mu": 0.5} if method == "chord" else {}
    forced = "ForcedChord" if method == "chord" else "ForcedGRPO"
    return {
        "mode": mode,
        "model": {"path": str(folder / "model"), "dtype": dtype},
        "data": {
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "chat": False,
            "shuffle": False,
            "max_prompt_tokens": 64,
            "max_expert_tokens": 128,
            **experts,
        },
        "method": {
            "name": f"{HERE / 'forced_length.py'}:{forced}",
            **options,
        },
        "reward": {"functions": [f"{HERE / 'workloads.py'}:even_letters"]},
        "rollout": {
            "prompts_per_step": w.prompts,
            "samples_per_prompt": w.samples,
            "max_tokens": w.tokens,
            "max_sequences": w.prompts * w.samples,
            "kv_cache_gib": 0.5,
        },
        "learner": {
            "learning_rate": w.learning_rate,
            "zero_stage": 0 if inline else 1,
            "micro_batch_tokens": args.micro_batch_tokens,
            "compile": args.compile,
        },
        "cluster": {"threads": args.threads},
        # a forced response cannot end, so it is not sampled from quite the learner's
        # distribution
        "sync": {"gate_steps": 0},
        "run": {
            "name": f"{mode}-{dtype}-{method}",
            "dir": str(folder / "runs"),
            "steps": args.warm + args.steps + 1,
            "save_model": False,
        },
    }


def start(args, side: str, folder: Path) -> Turn:
    """Start the process of `MODE DTYPE METHOD` or `trl DTYPE`; it stops before its first step."""
    place = folder / side.replace(" ", "-")
    place.mkdir()
    mode, dtype, *method = side.split()
    if mode == "trl":
        command = [
            args.peer_python,
            str(HERE / "peer_trl.py"),
            "--workload",
            args.workload,
            "--model",
            str(folder / "model"),
            "--data",
            str(folder),
            "--steps",
            str(args.warm + args.steps + 1),
            "--dtype",
            dtype,
        ]
    else:
        (place / "config.yaml").write_text(
            yaml.safe_dump(config(args, mode, dtype, method[0], folder))
        )
        command = [
            sys.executable,
            "-m",
            "tandem.launch.cli",
            "train",
            str(place / "config.yaml"),
            "--debug",
        ]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    with open(place / "out.txt", "w") as out:
        return Turn(
            place,
            subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={
                    **os.environ,
                    "PYTHONPATH": path,
                    "HF_HUB_OFFLINE": "1",
                    "BENCH_TURNS": str(place),
                },
            ),
        )


def take_turns(args, sides: list[str], folder: Path) -> dict[str, dict[str, list[float]]]:
    """{side: its metrics, one value per step that counts}.

    The sides are started one after the other and all stay up.
    """
    w, turns = WORKLOADS[args.workload], {}
    try:
        for side in sides:
            turns[side] = start(args, side, folder)
            turns[side].wait(0, args.timeout)
        for number in range(args.warm + args.steps):
            for turn in turns.values():
                turn.grant(number)
                turn.wait(number + 1, args.timeout)
        for turn in turns.values():
            turn.stop(args.timeout)
    finally:
        for turn in (turn for turn in turns.values() if turn.process.poll() is None):
            turn.process.terminate()
            try:
                turn.process.wait(timeout=60)
            except subprocess.TimeoutExpired:  # it waits for a turn that will not come
                turn.process.kill()
    results = {}
    for side, turn in turns.items():
        counted = slice(args.warm, args.warm + args.steps)
        results[side] = {"time/step": turn.seconds()[counted]}
        if side.startswith("trl"):
            found = json.loads((turn.place / "out.txt").read_text().strip().splitlines()[-1])
            assert all(
                t["completion"] == w.prompts * w.samples * w.tokens for t in found["tokens"]
            ), found["tokens"]
            results[side] |= {
                "time/rollout": found["generate"][counted],
                "tokens/real": [float(t["prompt"] + t["completion"]) for t in found["tokens"]][
                    counted
                ],
            }
        else:
            lines = [
                line
                for line in read_jsonl(folder / "runs" / side.replace(" ", "-") / "metrics.jsonl")
                if "time/step" in line
            ][counted]
            # the run's own clock counts the wait for its turn as rollout
            results[side] |= {
                key: [line[key] for line in lines]
                for key in (
                    "time/learn",
                    "time/sync",
                    "time/prepare",
                    "tokens/real",
                    "tokens/padded",
                    "seconds/optimizer",
                )
            }
            results[side]["time/rollout"] = [
                step - sum(line[f"time/{phase}"] for phase in ("learn", "sync", "prepare"))
                for step, line in zip(results[side]["time/step"], lines, strict=True)
            ]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=list(WORKLOADS), default="w4")
    parser.add_argument("--model", default="models/smollm2", help="of w1 (tandem fetch smollm2)")
    parser.add_argument("--peer-python", help="a Python with TRL; without it only Tandem is timed")
    parser.add_argument(
        "--peer-dtypes",
        nargs="*",
        help="default: those of --dtypes; autocast is TRL's own way to bfloat16",
    )
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument(
        "--modes", nargs="+", default=["inline", "cluster"], choices=("inline", "cluster")
    )
    parser.add_argument("--chord", action="store_true")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="our learner with learner.compile=true; give it more --warm steps",
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm", type=int, default=WARM)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(args.workload, folder)
        if args.workload == "w1":
            (folder / "model").symlink_to(Path(args.model).resolve())
        else:
            make_model(folder / "model")
        sides = [
            f"{mode} {dtype} {method}"
            for dtype in args.dtypes
            for mode in args.modes
            for method in (("grpo", "chord") if args.chord else ("grpo",))
        ]
        sides += (
            [f"trl {dtype}" for dtype in args.peer_dtypes or args.dtypes]
            if args.peer_python
            else []
        )
        peak = limits()
        results = take_turns(args, sides, folder)
    report(args, results, peak)


def report(args, results: dict[str, dict[str, list[float]]], peak: dict[str, float]) -> None:
    middle = {
        name: {key: median(values) for key, values in found.items()}
        for name, found in results.items()
    }
    steps = {name: found["time/step"] for name, found in middle.items()}
    parts = [
        (
            f"{name} {spread(results[name]['time/step'])} s (rollout "
            f"{middle[name]['time/rollout']:.3g})"
        )
        for name in results
    ]
    ratios = {}
    for dtype in args.dtypes:
        if (peer := steps.get(f"trl {dtype}")) is not None:
            ratios |= {
                f"TRL / {name}": peer / value
                for name, value in steps.items()
                if name.endswith(f"{dtype} grpo")
            }
        for mode in args.modes:
            if args.chord:
                grpo, chord = middle[f"{mode} {dtype} grpo"], middle[f"{mode} {dtype} chord"]
                scaled = grpo["time/step"] + grpo["time/learn"] * (
                    chord["tokens/real"] / grpo["tokens/real"] - 1
                )
                ratios[f"CHORD / GRPO of as many tokens, {mode} {dtype}"] = (
                    chord["time/step"] / scaled
                )
    peers, ours = (
        [
            v
            for name, v in steps.items()
            if name.startswith("trl") == side and not name.endswith("chord")
        ]
        for side in (True, False)
    )
    if peers:
        ratios["TRL best / Tandem best"] = min(peers) / min(ours)
    emit(
        "step",
        {
            "workload": args.workload,
            **vars(WORKLOADS[args.workload]),
            "threads": args.threads,
            "micro_batch_tokens": args.micro_batch_tokens,
            "compile": args.compile,
            "limits": peak,
            "median": middle,
            "ratios": ratios,
            "steps": {name: found["time/step"] for name, found in results.items()},
        },
        f"{args.workload}: {'; '.join(parts)}; "
        + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()),
        args.out,
    )


if __name__ == "__main__":
    main()
