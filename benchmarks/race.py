"""A fair race: every method on the demo task with the same budget of generated + trained tokens,
several seeds, one table and one picture.

    python benchmarks/race.py --out docs/race --tune
    python benchmarks/race.py --out docs/race
    python benchmarks/race.py --out docs/race --methods sft,chord_mu --seeds 0
    python benchmarks/race.py --out docs/race --report

--tune runs four settings of every method on a seed that is not raced (about 40 minutes on two
cores). The race takes each method with its best setting (about 30 minutes). --report makes table
and picture again from race.json.

All runs of a seed start from the same random initialisation, see the same 40 demonstrations and the
same stream of prompts, and are evaluated on the same held-out problems. Every method was given
equally many tries to find its setting: four learning rates; for methods whose demonstrations come
with their prompts two rates and two shares of such prompts; for the two-stage methods two rates and
two lengths of the first stage. Runs are one process with one thread (mode=inline), and time is its
CPU seconds, so that a busy machine does not decide the race. The raw numbers of every evaluation
are kept in race.json (tuning: tune.json).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml

BUDGET = 800_000  # generated + trained tokens per run
EXPERTS = 40
# of `sort`: the demonstrations alone take a model from nothing to a third of the held-out problems,
# samples alone never find one
TASK = {"digits": 5}
TUNING_SEED = 100
BASE = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": TASK},
        "experts": {"path": "task:sort", "options": {**TASK, "size": EXPERTS, "seed": 1}},
        "evaluation": {"path": "task:sort", "split": "test", "options": {**TASK, "size": 256}},
        "max_prompt_tokens": 32,
        "max_expert_tokens": 16,
        "experts_per_step": 64,
    },
    "rollout": {
        "prompts_per_step": 16,
        "samples_per_prompt": 8,
        "max_tokens": 8,
        "max_sequences": 256,
    },
    "reward": {"functions": ["exact"]},
    "learner": {
        "learning_rate": 5e-4,
        "warmup_steps": 20,
        "betas": [0.9, 0.95],
        "weight_decay": 0.1,
        "micro_batch_tokens": 4096,
    },
    "eval": {"every": 20},
    "run": {"steps": 3000, "token_budget": BUDGET, "save_model": False},
}
METHODS: dict[str, dict] = {
    "sft": {"name": "sft"},
    "grpo": {"name": "grpo"},
    "sft_rl": {"name": "sft_rl"},
    "static_mix": {"name": "static_mix", "mu": 0.5},
    "rl_with_sft": {"name": "rl_with_sft"},
    "alternating": {"name": "alternating", "every": 2},
    "chord_mu": {
        "name": "chord_mu",
        "mu": {"kind": "cosine", "peak": 0.9, "valley": 0.05, "decay": 80},
    },
    "chord_phi": {"name": "chord_phi"},
    "sft_is": {"name": "sft_is"},
    "luffy": {"name": "luffy"},
    "srft": {"name": "srft"},
    "prefix_rft": {
        "name": "prefix_rft",
        "low": {"kind": "cosine", "peak": 0.95, "valley": 0.0, "decay": 80},
    },
    "uft": {"name": "uft", "hint_steps": 80},
    "hpt": {"name": "hpt"},
    "visurf": {"name": "visurf"},
    "relift": {"name": "relift", "buffer": 32},
    "sasr": {"name": "sasr", "warmup": 100},
    "ift": {"name": "ift"},
    "ppo": {"name": "ppo"},
    "reft": {"name": "reft"},
}
# CARFT does not race: it starts from a model that is right now and then, and has nothing to draw on
# before.

# a demonstration comes with its prompt, which is one of the step's prompts
ALIGNED = ("luffy", "srft", "prefix_rft", "uft", "hpt", "visurf", "relift")


# SFT steps have a learning rate of their own
TWO_RATES = ("sft_rl", "reft", "alternating", "relift", "sasr")


def tries(name: str) -> list[dict]:
    """Four settings per method to choose from on the tuning seed, as overrides of its config."""
    fixed = {"method.sft_learning_rate": 5e-4} if name in TWO_RATES else {}
    if name in ("sft_rl", "reft"):
        found = [
            {"learner.learning_rate": rate, "method.sft_steps": steps}
            for steps in (100, 200)
            for rate in (5e-5, 1e-4)
        ]
    elif name in ALIGNED:
        found = [
            {"learner.learning_rate": rate, "data.experts_per_step": experts}
            for experts in (8, 16)
            for rate in ((5e-5, 2e-4) if fixed else (2e-4, 5e-4))
        ]
    else:
        found = [
            {"learner.learning_rate": rate}
            for rate in ((5e-5, 1e-4, 2e-4, 5e-4) if fixed else (1e-4, 2e-4, 5e-4, 1e-3))
        ]
    return [{**fixed, **setting} for setting in found]


def as_text(value: float) -> str:
    """A number as an override, never with an exponent."""
    if value < 1e-3:
        return f"{value:.6f}"
    return json.dumps(value)


def run(name: str, seed: int, setting: dict, folder: Path) -> dict:
    """One run in a process of its own. Its evaluations: (steps, tokens, CPU seconds, accuracy)."""
    place = Path(tempfile.mkdtemp(dir=folder))
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump({**BASE, "method": METHODS[name]}))
    began = time.perf_counter()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tandem.launch.cli",
            "train",
            str(config),
            f"run.dir={place}",
            "run.name=run",
            f"run.seed={seed}",
            *(f"{key}={as_text(value)}" for key, value in setting.items()),
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = (
        [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
        if (place / "run").exists()
        else []
    )
    tokens, seconds, points = 0, 0.0, []
    for line in lines:
        tokens, seconds = int(line.get("tokens/total", tokens)), line.get("cpu_seconds", seconds)
        if "eval/accuracy" in line:
            points.append((line["step"], tokens, seconds, line["eval/accuracy"]))
    accuracy = points[-1][3] if points else float("nan")
    told = (
        f"{name:12} seed {seed}, {setting}: {accuracy:.3f} after {tokens:,} tokens, "
        f"{time.perf_counter() - began:.0f} s"
    )
    if done.returncode != 0:
        told += f"  FAILED ({done.returncode}): {done.stderr.strip().splitlines()[-1:]}"
    print(told, flush=True)
    return {
        "method": name,
        "seed": seed,
        "setting": setting,
        "returncode": done.returncode,
        "points": points,
    }


def score(run: dict) -> float:
    """What a setting is chosen by: the mean of the last three evaluations, 0 for a run that failed.

    One evaluation has a standard error of 0.03.
    """
    return (
        float(np.mean([p[3] for p in run["points"][-3:]]))
        if run["returncode"] == 0 and run["points"]
        else 0.0
    )


def best(runs: list[dict]) -> dict[str, dict]:
    """{method: its best setting on the tuning seed}; of equals the first."""
    found: dict[str, dict] = {}
    for name in METHODS:
        tried = [
            next((r for r in runs if (r["method"], r["setting"]) == (name, setting)), None)
            for setting in tries(name)
        ]
        if all(tried):
            found[name] = max(tried, key=score)["setting"]
    return found


def tuning_line(one: dict, chosen: bool) -> str:
    settings = ", ".join(f"{key} {value:g}" for key, value in one["setting"].items())
    mark = "x" if chosen else ""
    return f"| {one['method']} | {settings} | {score(one):.3f} | {mark} |"


def tuning_table(runs: list[dict]) -> str:
    chosen = best(runs)
    lines = []
    for name in METHODS:
        for setting in tries(name):
            for one in runs:
                if (one["method"], one["setting"]) == (name, setting):
                    lines.append(tuning_line(one, chosen.get(name) == setting))
    return (
        (
            "| method | setting | held-out accuracy, mean of the last three evaluations | raced "
            "|\n|---|---|---|---|\n"
        )
        + "\n".join(lines)
        + "\n"
    )


def table(runs: list[dict]) -> str:
    rows = []
    for name in METHODS:
        mine = [r for r in runs if r["method"] == name and r["returncode"] == 0 and r["points"]]
        if mine:
            last, best = (
                np.array([f(r) for r in mine])
                for f in (lambda r: r["points"][-1][3], lambda r: max(p[3] for p in r["points"]))
            )
            half = [next((p[1] for p in r["points"] if p[3] >= 0.5), None) for r in mine]
            reached = (
                f"{np.mean([h for h in half]) / 1e6:.2f} M"
                if all(half)
                else f"{sum(h is not None for h in half)} of {len(half)} runs"
                if any(half)
                else "never"
            )
            seconds = np.mean([r["points"][-1][2] for r in mine])
            rows.append(
                (
                    last.mean(),
                    (
                        f"| {name} | {last.mean():.3f} | {last.min():.3f} - {last.max():.3f} | "
                        f"{best.mean():.3f} | {reached} | {seconds:.0f} | {len(mine)} |"
                    ),
                )
            )
    head = (
        "| method | held-out accuracy | smallest - largest seed | best on the way | tokens until "
        "0.5 | CPU seconds | seeds |\n|---|---|---|---|---|---|---|\n"
    )
    return head + "\n".join(row for _, row in sorted(rows, reverse=True)) + "\n"


def picture(runs: list[dict], out: Path) -> None:
    """One small panel per method, accuracy against tokens and against seconds, the two-stage
    baseline in grey behind each.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in METHODS if any(r["method"] == n for r in runs)]
    columns = 6
    rows = -(-len(names) // columns)
    for axis, file, label in (
        (1, "race_tokens.png", "million tokens generated + trained"),
        (2, "race_seconds.png", "CPU seconds"),
    ):
        fig, axes = plt.subplots(
            rows,
            columns,
            figsize=(2.1 * columns, 1.9 * rows),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for ax, name in zip(axes.flat, names, strict=False):
            for other, colour, width in (("sft_rl", "0.75", 1.5), (name, "#0072B2", 1.0)):
                curves = [
                    np.array(r["points"], float)
                    for r in runs
                    if r["method"] == other and r["points"]
                ]
                for c in curves:
                    ax.plot(
                        c[:, axis] / (1e6 if axis == 1 else 1),
                        c[:, 3],
                        color=colour,
                        linewidth=0.5,
                        alpha=0.6,
                    )
                if curves:
                    grid = np.linspace(0, min(c[-1, axis] for c in curves), 60)
                    ax.plot(
                        grid / (1e6 if axis == 1 else 1),
                        np.mean([np.interp(grid, c[:, axis], c[:, 3]) for c in curves], 0),
                        color=colour,
                        linewidth=width + 0.8,
                    )
            ax.set_title(name, fontsize=9)
            ax.set_ylim(0, 1)
        for ax in axes.flat[len(names) :]:
            ax.axis("off")
        fig.supxlabel(label, fontsize=9)
        fig.supylabel("held-out accuracy", fontsize=9)
        fig.savefig(out / file, dpi=110)
        plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="run the four settings of each method on the tuning seed, which is not raced",
    )
    parser.add_argument(
        "--report", action="store_true", help="only table and picture, from race.json"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    raw = args.out / ("tune.json" if args.tune else "race.json")
    runs = json.loads(raw.read_text())["runs"] if raw.exists() else []
    if not args.report:
        methods, seeds = (
            args.methods.split(","),
            [TUNING_SEED] if args.tune else [int(s) for s in args.seeds.split(",")],
        )
        chosen = {} if args.tune else best(json.loads((args.out / "tune.json").read_text())["runs"])
        have = [(r["method"], r["seed"], r["setting"]) for r in runs if r["returncode"] == 0]
        jobs = [
            job
            for s in seeds
            for m in methods
            for setting in (tries(m) if args.tune else [chosen[m]])
            if (job := (m, s, setting)) not in have
        ]
        facts = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "command": " ".join(sys.argv),
            "budget": BUDGET,
            "parallel": args.parallel,
            "base": BASE,
            "methods": METHODS,
        }
        with (
            tempfile.TemporaryDirectory() as scratch,
            concurrent.futures.ThreadPoolExecutor(args.parallel) as pool,
        ):
            for done in concurrent.futures.as_completed(
                [pool.submit(run, *job, Path(scratch)) for job in jobs]
            ):
                runs = [
                    r
                    for r in runs
                    if (r["method"], r["seed"], r["setting"])
                    != tuple(done.result()[k] for k in ("method", "seed", "setting"))
                ] + [done.result()]
                raw.write_text(json.dumps({**facts, "runs": runs}))
    (args.out / ("tune.md" if args.tune else "table.md")).write_text(
        text := (tuning_table if args.tune else table)(runs)
    )
    if not args.tune:
        picture(runs, args.out)
    print(text)


if __name__ == "__main__":
    main()
