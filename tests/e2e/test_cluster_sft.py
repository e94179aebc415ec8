"""SFT on the real stack: Ray and a DeepSpeed rank, and no rollout engine."""

import json
import math
import subprocess
import sys
import time

import psutil
import pytest
import yaml

CONFIG = {
    "mode": "cluster",
    "model": {"path": "tandem:tiny"},
    "data": {
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 16}},
        "experts_per_step": 6,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 32,
    },
    "method": {"name": "sft"},
    "learner": {"learning_rate": 1e-3},
    # more than any machine has: nobody may ask for an engine's place
    "cluster": {"learner_cpus": 0.5, "engine_cpus": 100_000},
    "run": {"steps": 3, "name": "run"},
}


def titles(process: subprocess.Popen) -> set[str]:
    found = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found.add(" ".join(child.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.mark.stack
def test_no_engine_process_is_started(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "tandem.launch.cli", "train", "c.yaml", "run.dir=."]
    seen: set[str] = set()
    with open(tmp_path / "out.txt", "w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path)
        while process.poll() is None:
            seen |= titles(process)
            time.sleep(0.1)
        text = (tmp_path / "out.txt").read_text()
    assert process.returncode == 0, text

    assert any("RankActor" in title for title in seen), "the look sees actors"
    assert not [title for title in seen if "EngineActor" in title or "VLLM" in title]
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert not [name for name in logs if "engine" in name], logs
    assert "no rollout engine starts" in text and "learner up after" in text
    assert "asked for 1 learner rank(s) of" in text

    path = tmp_path / "run" / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(steps) == 3 and all(step["grad_norm"] > 0 for step in steps)
    assert all(math.isfinite(step["loss"]) and "rollout/idle" not in step for step in steps)
    (header,) = [line for line in text.splitlines() if line.split()[:1] == ["step"]]
    assert header.split()[1] == "loss"
    assert (tmp_path / "run" / "checkpoints" / "step_3").is_dir()
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
