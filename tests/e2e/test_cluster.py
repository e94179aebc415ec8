"""Whole runs on the real stack: Ray actors, a vLLM engine, DeepSpeed ranks over gloo, started by
the command a user types.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

CONFIG = {
    "mode": "cluster",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "evaluation": {"path": "task:sort", "split": "test", "options": {"digits": 3, "size": 8}},
        "experts_per_step": 6,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "method": {"name": "chord_mu", "mu": 0.3},
    "rollout": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_tokens": 6},
    "reward": {"functions": [f"{Path(__file__).parent / 'short_reward.py'}:score"]},
    "learner": {"learning_rate": 1e-3, "micro_batch_tokens": 128, "zero_stage": 2},
    "cluster": {"learner_ranks": 2, "learner_cpus": 0.5, "engine_cpus": 0.5},
    "run": {"steps": 4, "checkpoint_every": 2},
}


def start(folder: Path, *overrides: str) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tandem.launch.cli",
            "train",
            str(folder / "config.yaml"),
            f"run.dir={folder}",
            "run.name=run",
            *overrides,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path, kind: str) -> list[dict]:
    return [e for e in lines(folder / "run" / "events.jsonl") if e["kind"] == kind]


def wait_for(condition, process, seconds=200):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    raise AssertionError("condition not met in time")


def family(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def survivors(processes) -> list[str]:
    time.sleep(2)
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.stack
def test_a_run_with_two_ranks_survives_the_death_of_its_engine(tmp_path):
    """ZeRO-2 on two ranks, rollouts one step ahead, the engine process killed in the middle: the
    run goes on with proved weights and ends well.
    """
    process = start(tmp_path, "rollout.staleness=1", "run.steps=6")
    try:
        wait_for(
            lambda: any("grad_norm" in line for line in lines(tmp_path / "run" / "metrics.jsonl")),
            process,
        )
        members = family(process)
        (engine,) = [
            p for p in members if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())
        ]
        engine.kill()
        output, _ = process.communicate(timeout=250)
    finally:
        process.kill()
    assert process.returncode == 0, output
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert [s["step"] for s in steps] == list(range(6))
    assert (
        events(tmp_path, "engines_restarted")
        and all(e["max_gap"] < 1e-4 for e in events(tmp_path, "gate"))
        and len(events(tmp_path, "gate")) == 2
    )
    assert [e["version"] for e in events(tmp_path, "sync")][-1] == 6
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 6 * 16
    for r in rollouts:
        sampled = np.array(r["version"])[np.array(r["source"]) == 1]
        assert (sampled >= 0).all() and (r["step"] - sampled <= 1).all(), (
            "a token older than the staleness bound was trained on"
        )
    from transformers import AutoModelForCausalLM

    from tandem.launch.export import export

    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").num_parameters() > 600_000
    )
    exported = export(tmp_path / "run" / "checkpoints" / "step_6", tmp_path / "exported")
    for path in (tmp_path / "run" / "model").iterdir():
        assert (exported / path.name).read_bytes() == path.read_bytes(), path.name
    assert survivors(members) == []
    assert "Loading" not in output and "WARNING" not in output, (
        "third-party noise belongs into logs/"
    )


@pytest.mark.stack
def test_sigterm_to_all_processes_leaves_a_checkpoint_that_the_next_start_continues(tmp_path):
    """As a scheduler sends it: to the whole process group.

    With over-sampling: every step trains on four groups of five.
    """
    process = start(tmp_path, "run.steps=400", "rollout.over_sample=1")
    try:
        wait_for(
            lambda: (
                len(
                    [
                        line
                        for line in lines(tmp_path / "run" / "metrics.jsonl")
                        if "grad_norm" in line
                    ]
                )
                >= 3
            ),
            process,
        )
        members = family(process)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 75 and "resume=true" in output, output
    assert survivors(members) == []
    done = events(tmp_path, "checkpoint")[-1]["step"]
    process = start(tmp_path, f"run.steps={done + 2}", "run.resume=true", "rollout.over_sample=1")
    output, _ = process.communicate(timeout=250)
    assert process.returncode == 0, output
    steps = [line for line in lines(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(done + 2)) and all(
        line["rollout/aborted"] == 1 for line in steps
    )
    assert [e["gap"] for e in events(tmp_path, "first_sync")] == [0, 0], (
        "of both starts, on the weights of the model folder"
    )
    rollouts = lines(tmp_path / "run" / "rollouts.jsonl")
    assert len(rollouts) == 16 * (done + 2) and all(
        r["group"] // 5 == r["step"] and r["finish"] != "abort" for r in rollouts
    )


@pytest.mark.slow
@pytest.mark.stack
def test_real_stack_resume_equals_an_uninterrupted_run(tmp_path):
    """Weights after 4 steps and after 2 + resume + 2, with replayed rollouts so that only the
    learner's state is in question: equal to the bit.
    """
    recorder = start(tmp_path / "record", "run.steps=4")
    assert recorder.wait(timeout=250) == 0
    record = tmp_path / "record" / "run" / "rollouts.jsonl"
    replay = ("rollout.backend=replay", f"rollout.record={record}", "data.evaluation=null")
    assert start(tmp_path / "a", *replay).wait(timeout=250) == 0
    first = start(tmp_path / "b", *replay)
    wait_for(lambda: (tmp_path / "b" / "run" / "checkpoints" / "step_2").exists(), first)
    first.send_signal(signal.SIGKILL)
    members = family(first) if first.poll() is None else []
    first.wait()
    for p in members:
        if p.is_running():
            os.kill(p.pid, signal.SIGKILL)
    assert start(tmp_path / "b", *replay, "run.resume=true").wait(timeout=250) == 0
    from safetensors.torch import load_file

    a, b = (
        load_file(next((tmp_path / x / "run" / "checkpoints" / "step_4").rglob("*.safetensors")))
        for x in "ab"
    )
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
