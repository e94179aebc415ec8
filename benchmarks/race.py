"""A fair race: every method on the demo task with the same budget of generated + trained tokens, several seeds, one table and one picture.

    python benchmarks/race.py --out docs/race                       the whole race (about an hour on two cores)
    python benchmarks/race.py --out docs/race --methods sft,chord_mu --seeds 0
    python benchmarks/race.py --out docs/race --tune                what the two-stage baseline was tuned on
    python benchmarks/race.py --out docs/race --report              table and picture again from race.json

All runs start from the same random initialisation per seed, see the same 100 demonstrations and prompts of the same stream, use one learning rate and
one batch size, and are evaluated on the same held-out problems; what differs is the method and its coefficients, which METHODS below lists in full.
`sft_rl` is the tuned baseline: `--tune` runs it with several SFT lengths on seed 100, which is not raced, and the best one stands in METHODS. Runs are one
process with one thread (mode=inline), and time is its CPU seconds, so that a busy machine does not decide the race. The raw numbers of every evaluation
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

BUDGET = 700_000        # generated + trained tokens per run
EXPERTS = 100
BASE = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {"prompts": {"path": "task:sort"}, "experts": {"path": "task:sort", "options": {"size": EXPERTS, "seed": 1, "response": "{answer}"}},
             "evaluation": {"path": "task:sort", "split": "test", "options": {"size": 256}},
             "max_prompt_tokens": 32, "max_expert_tokens": 16, "experts_per_step": 64},
    "rollout": {"prompts_per_step": 32, "samples_per_prompt": 8, "max_tokens": 12, "max_sequences": 256},
    "reward": {"functions": ["exact"]},
    "learner": {"learning_rate": 5e-4, "warmup_steps": 20, "betas": [0.9, 0.95], "weight_decay": 0.1, "micro_batch_tokens": 4096},
    "eval": {"every": 20},
    "run": {"steps": 3000, "token_budget": BUDGET, "save_model": False},
}
METHODS: dict[str, dict] = {
    "sft": {"name": "sft"},
    "grpo": {"name": "grpo"},
    "sft_rl": {"name": "sft_rl", "sft_steps": 120},
    "static_mix": {"name": "static_mix", "mu": 0.5},
    "rl_with_sft": {"name": "rl_with_sft"},
    "alternating": {"name": "alternating", "every": 2},
    "chord_mu": {"name": "chord_mu", "mu": {"kind": "cosine", "peak": 0.9, "valley": 0.05, "decay": 40}},
    "chord_phi": {"name": "chord_phi"},
    "sft_is": {"name": "sft_is"},
    "luffy": {"name": "luffy"},
    "srft": {"name": "srft"},
    "prefix_rft": {"name": "prefix_rft", "low": {"kind": "cosine", "peak": 0.95, "valley": 0.0, "decay": 40}},
    "uft": {"name": "uft", "hint_steps": 40},
    "hpt": {"name": "hpt"},
    "visurf": {"name": "visurf"},
    "relift": {"name": "relift", "buffer": 32},
    "sasr": {"name": "sasr", "warmup": 100},
}
TUNING = {f"sft_rl_{n}": {"name": "sft_rl", "sft_steps": n} for n in (120, 200, 300)}


def run(name: str, seed: int, folder: Path) -> dict:
    """One run in a process of its own; its evaluations as (steps, tokens, CPU seconds, accuracy)."""
    place = folder / f"{name}-{seed}"
    place.mkdir(parents=True)
    config = place / "config.yaml"
    config.write_text(yaml.safe_dump({**BASE, "method": {**METHODS, **TUNING}[name]}))
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "tandem.launch.cli", "train", str(config), f"run.dir={place}", "run.name=run", f"run.seed={seed}"],
                          capture_output=True, text=True, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()] if (place / "run").exists() else []
    tokens, seconds, points = 0, 0.0, []
    for line in lines:
        tokens, seconds = int(line.get("tokens/total", tokens)), line.get("cpu_seconds", seconds)
        if "eval/accuracy" in line:
            points.append((line["step"], tokens, seconds, line["eval/accuracy"]))
    print(f"{name:12} seed {seed}: {points[-1][3] if points else float('nan'):.3f} after {tokens:,} tokens, {time.perf_counter() - began:.0f} s"
          + ("" if done.returncode == 0 else f"  FAILED ({done.returncode}): {done.stderr.strip().splitlines()[-1:]}"), flush=True)
    return {"method": name, "seed": seed, "returncode": done.returncode, "points": points}


def table(runs: list[dict]) -> str:
    rows = []
    for name in {**METHODS, **TUNING}:
        mine = [r for r in runs if r["method"] == name and r["returncode"] == 0 and r["points"]]
        if mine:
            last, best = (np.array([f(r) for r in mine]) for f in (lambda r: r["points"][-1][3], lambda r: max(p[3] for p in r["points"])))
            half = [next((p[1] for p in r["points"] if p[3] >= 0.5), None) for r in mine]
            reached = f"{np.mean([h for h in half]) / 1e6:.2f} M" if all(half) else f"{sum(h is not None for h in half)} of {len(half)} runs" if any(half) else "never"
            seconds = np.mean([r["points"][-1][2] for r in mine])
            rows.append((last.mean(), f"| {name} | {last.mean():.3f} | {last.min():.3f} - {last.max():.3f} | {best.mean():.3f} | {reached} | {seconds:.0f} | {len(mine)} |"))
    head = "| method | held-out accuracy | smallest - largest seed | best on the way | tokens until 0.5 | CPU seconds | seeds |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(row for _, row in sorted(rows, reverse=True)) + "\n"


def picture(runs: list[dict], out: Path) -> None:
    """One small panel per method, accuracy against tokens and against seconds, the two-stage baseline in grey behind each."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = [n for n in METHODS if any(r["method"] == n for r in runs)]
    columns = 6
    rows = -(-len(names) // columns)
    for axis, file, label in ((1, "race_tokens.png", "million tokens generated + trained"), (2, "race_seconds.png", "CPU seconds")):
        fig, axes = plt.subplots(rows, columns, figsize=(2.1 * columns, 1.9 * rows), sharex=True, sharey=True, squeeze=False, layout="constrained")
        for ax, name in zip(axes.flat, names):
            for other, colour, width in (("sft_rl", "0.75", 1.5), (name, "#0072B2", 1.0)):
                curves = [np.array(r["points"], float) for r in runs if r["method"] == other and r["points"]]
                for c in curves:
                    ax.plot(c[:, axis] / (1e6 if axis == 1 else 1), c[:, 3], color=colour, linewidth=0.5, alpha=0.6)
                if curves:
                    grid = np.linspace(0, min(c[-1, axis] for c in curves), 60)
                    ax.plot(grid / (1e6 if axis == 1 else 1), np.mean([np.interp(grid, c[:, axis], c[:, 3]) for c in curves], 0), color=colour, linewidth=width + 0.8)
            ax.set_title(name, fontsize=9)
            ax.set_ylim(0, 1)
        for ax in axes.flat[len(names):]:
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
    parser.add_argument("--tune", action="store_true", help="run TUNING on seed 100 instead")
    parser.add_argument("--report", action="store_true", help="only table and picture, from race.json")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tune:
        args.methods, args.seeds = ",".join(TUNING), "100"
    raw = args.out / ("tune.json" if args.tune else "race.json")
    runs = json.loads(raw.read_text())["runs"] if raw.exists() else []
    if not args.report:
        have = {(r["method"], r["seed"]) for r in runs if r["returncode"] == 0}
        jobs = [(m, int(s)) for s in args.seeds.split(",") for m in args.methods.split(",") if (m, int(s)) not in have]
        facts = {"date": time.strftime("%Y-%m-%d"), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "command": " ".join(sys.argv), "budget": BUDGET,
                 "parallel": args.parallel, "base": BASE, "methods": METHODS}
        with tempfile.TemporaryDirectory() as scratch, concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
            for done in concurrent.futures.as_completed([pool.submit(run, m, s, Path(scratch)) for m, s in jobs]):
                runs = [r for r in runs if (r["method"], r["seed"]) != (done.result()["method"], done.result()["seed"])] + [done.result()]
                raw.write_text(json.dumps({**facts, "runs": runs}))
    (args.out / ("tune.md" if args.tune else "table.md")).write_text(table(runs))
    if not args.tune:
        picture(runs, args.out)
    print(table(runs))


if __name__ == "__main__":
    main()
