"""Golden runs: what the shipped method configs compute, to the bit, before and after a change.

    python benchmarks/golden.py record OUT.json            # three inline steps of every
                                                           configs/methods/*.yaml
    python benchmarks/golden.py record OUT.json --cluster  # and two replayed steps on two DeepSpeed
                                            ranks
    python benchmarks/golden.py compare OLD.json NEW.json

Every run goes through the command line, so that a checkout before a change and one after it can be
asked the same. Recorded are the digest of the saved weights and every metric that does not measure
time or memory. Figures are those of one machine: record both sides on the same one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "methods"
REWARD = ROOT / "tests" / "e2e" / "short_reward.py"
SMALL = [
    "run.name=golden",
    "run.checkpoint_every=0",
    "run.save_model=true",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "data.experts_per_step=4",
    "data.evaluation=null",
    "reward.options={}",
    f"reward.functions=[{REWARD}:score]",
]
STAGES = {  # so that a few steps show both stages of a method that has two
    "sft_rl": ["method.sft_steps=1"],
    "reft": ["method.sft_steps=1"],
    "alternating": ["method.every=2"],
    "relift": ["method.buffer=1"],
    "sasr": ["method.warmup=1"],
    "uft": ["method.p=0.7"],
    "dmt": ["method.special_steps=1"],
}
UNSTABLE = ("time/", "seconds", "memory", "cpu_seconds", "tokens_per_second", "idle")


def train(folder: Path, config: Path, *overrides: str) -> None:
    """Run `tandem train` in `folder`.

    Raises RuntimeError with the end of its output if it fails.
    """
    command = [sys.executable, "-m", "tandem.launch.cli", "train", str(config), *SMALL]
    command += [f"run.dir={folder}", *overrides]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{config.name}: exit code {result.returncode}\n{result.stderr[-2000:]}")


def outcome(run: Path) -> dict:
    """The digest of the run's model and the stable metrics of its steps."""
    weights = (run / "model" / "model.safetensors").read_bytes()
    steps = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        steps.append({key: metrics[key] for key in sorted(metrics) if is_stable(key)})
    return {"weights": hashlib.blake2b(weights, digest_size=16).hexdigest(), "steps": steps}


def is_stable(key: str) -> bool:
    return not any(word in key for word in UNSTABLE)


def inline_run(name: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        config = CONFIGS / f"{name}.yaml"
        overrides = ["mode=inline", "run.steps=3", *STAGES.get(name, [])]
        train(Path(folder), config, *overrides)
        return outcome(Path(folder) / "golden")


def cluster_run() -> dict:
    """Rollouts recorded inline, then trained on by two DeepSpeed ranks."""
    config = CONFIGS / "chord_mu.yaml"
    with tempfile.TemporaryDirectory() as folder:
        recorded, replayed = Path(folder) / "recorded", Path(folder) / "replayed"
        recorded.mkdir()
        replayed.mkdir()
        train(recorded, config, "mode=inline", "run.steps=2")
        overrides = [
            "run.steps=2",
            "rollout.backend=replay",
            f"rollout.record={recorded / 'golden' / 'rollouts.jsonl'}",
            "cluster.learner_ranks=2",
            "cluster.learner_cpus=0.5",
            "learner.zero_stage=2",
        ]
        train(replayed, config, *overrides)
        return outcome(replayed / "golden")


def record(out: Path, cluster: bool) -> None:
    found = {}
    for config in sorted(CONFIGS.glob("*.yaml")):
        if config.stem.startswith("_"):
            continue
        found[config.stem] = inline_run(config.stem)
        print(f"{config.stem:<14} {found[config.stem]['weights']}", flush=True)
    if cluster:
        found["cluster: chord_mu"] = cluster_run()
        print(f"cluster        {found['cluster: chord_mu']['weights']}", flush=True)
    out.write_text(json.dumps(found, indent=1))


def compare(old: Path, new: Path) -> int:
    """Print every difference; returns 1 if there is one."""
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    differences = 0
    for name in sorted(before.keys() | after.keys()):
        found = describe(before.get(name), after.get(name))
        if found:
            differences += 1
        print(f"{name:<18} {found or 'equal'}")
    return int(differences > 0)


def describe(before: dict | None, after: dict | None) -> str:
    """What differs between two outcomes, or ''."""
    if before is None or after is None:
        return "only in one of the two files"
    words = []
    if before["weights"] != after["weights"]:
        words.append("weights differ")
    if len(before["steps"]) != len(after["steps"]):
        words.append(f"{len(before['steps'])} steps became {len(after['steps'])}")
    for step, (one, other) in enumerate(zip(before["steps"], after["steps"], strict=False)):
        keys = sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
        if keys:
            words.append(f"step {step}: {', '.join(keys)}")
    return "; ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("record")
    sub.add_argument("out", type=Path)
    sub.add_argument("--cluster", action="store_true", help="also a run on two DeepSpeed ranks")
    sub = commands.add_parser("compare")
    sub.add_argument("old", type=Path)
    sub.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.out, args.cluster)
        return 0
    return compare(args.old, args.new)


if __name__ == "__main__":
    sys.exit(main())
