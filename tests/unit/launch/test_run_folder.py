"""The run folder: one owner, nothing of the user's overwritten, torn files, and what a resume
compares.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tandem.engine.config.names import name_fault
from tandem.engine.core import folder_lock
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.folder_lock import LOCK, owned
from tandem.launch import cli

pytestmark = pytest.mark.whole_run

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "d.jsonl"},
        "experts": {"path": "task:sort", "options": {"digits": 3, "size": 8}},
        "experts_per_step": 2,
        "max_prompt_tokens": 32,
        "max_expert_tokens": 16,
    },
    "method": {"name": "chord_mu"},
    "rollout": {"prompts_per_step": 2, "samples_per_prompt": 2, "max_tokens": 4},
    "reward": {"functions": ["exact"]},
    "learner": {"learning_rate": 1e-3},
    "run": {"steps": 1, "save_model": False},
}
ROWS = "".join(json.dumps({"prompt": f"sort {i}12=", "answer": f"12{i}"}) + "\n" for i in range(8))


@pytest.fixture
def folder(in_tmp):
    (in_tmp / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (in_tmp / "d.jsonl").write_text(ROWS)
    return in_tmp


@pytest.fixture
def refused(folder, capsys):
    def run(*overrides: str) -> str:
        capsys.readouterr()
        code = cli.main(["train", "c.yaml", *overrides])
        message = capsys.readouterr().err
        assert code == 2 and message.startswith("error: ") and "Traceback" not in message, (
            code,
            message,
        )
        return message

    return run


def train(*overrides: str) -> int:
    return cli.main(["train", "c.yaml", *overrides])


def steps() -> list[int]:
    return [
        json.loads(line)["step"] for line in Path("runs/run/metrics.jsonl").read_text().splitlines()
    ]


def files(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


HOLDER = """
import sys, time
from pathlib import Path
from tandem.engine.core.folder_lock import owned
with owned(Path(sys.argv[1])):
    print("owned", flush=True)
    time.sleep(600)
"""


def holder(place: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "owned\n"
    return process


def test_a_folder_has_one_owner_who_is_named_and_a_dead_one_does_not_count(folder, refused):
    place = folder / "runs" / "run"
    place.mkdir(parents=True)
    process = holder(place)
    try:
        before = files(place)
        for resume in ("false", "true", "auto"):
            message = refused(f"run.resume={resume}")
            assert f"process {process.pid} on host" in message or resume == "true"
        assert files(place) == before  # the one that was refused wrote nothing
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert train() == 0
    assert not (place / LOCK).exists()


def test_a_child_does_not_keep_the_lock(tmp_path):
    with owned(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(600)
    try:
        with owned(tmp_path):
            pass
        sleeper = subprocess.Popen(["sleep", "600"])
        with owned(tmp_path):
            pass
        sleeper.kill()
        sleeper.wait()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_torn_lock_file_does_not_count(tmp_path):
    for content in (b"", b"{", b"\0" * 100, b"[1]", b'{"pid": 1}'):
        (tmp_path / LOCK).write_bytes(content)
        with owned(tmp_path, lambda text: None):
            pass


def test_where_there_is_no_flock_an_owner_that_beats_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "lock_file", lambda descriptor: False)
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(folder_lock, "SETTLE_SECONDS", 0.05)
    with (
        owned(tmp_path, lambda text: None),
        pytest.raises(ConfigError, match="is in use by process"),
        owned(tmp_path, lambda text: None),
    ):
        pass


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "/abs", "..\\x", "-x", "a\nb", "a\0b"])
def test_a_name_is_a_name_and_not_a_path(name):
    assert name_fault(name)


@pytest.mark.parametrize("name", ["run", "run 1", "é", "2026-11-28", "a.b", "x_y-z"])
def test_names_that_are_fine(name):
    assert not name_fault(name)


def test_nothing_of_the_users_is_overwritten(folder, refused):
    for name in ("config.yaml", "metrics.jsonl", "notes.txt", "model"):
        place = folder / "runs" / name.partition(".")[0]
        place.mkdir(parents=True)
        if name == "model":
            (place / "model").mkdir()
            (place / "model" / "mine").write_text("mine")
        else:
            (place / name).write_text("mine")
        before = files(place)
        message = refused(f"run.name={place.name}")
        assert "no run of Tandem" in message and name in message
        assert files(place) == before
    assert train("run.name=notes", "run.beside_files=true") == 0
    assert (folder / "runs" / "notes" / "notes.txt").read_text() == "mine"


def test_one_command_for_the_first_start_and_every_restart(folder, refused, capsys):
    command = ("run.resume=auto", "run.checkpoint_every=1", "run.steps=2")
    assert "run.resume=auto" in refused("run.resume=true")
    assert train(*command) == 0 and steps() == [0, 1]
    assert train("run.resume=auto", "run.checkpoint_every=1", "run.steps=3") == 0 and steps() == [
        0,
        1,
        2,
    ]
    # an attempt that died before its first checkpoint
    place = folder / "runs" / "early"
    assert train("run.name=early") == 0
    for step in (place / "checkpoints").iterdir():
        for path in sorted(step.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        step.rmdir()
    lost = (place / "metrics.jsonl").read_bytes()
    assert "run.resume=auto" in refused("run.name=early")
    assert "run.resume=auto" in refused("run.name=early", "run.resume=true")
    assert train("run.name=early", "run.resume=auto") == 0
    assert (place / "attempt_1" / "metrics.jsonl").read_bytes() == lost
    assert "started over" in capsys.readouterr().out


DAMAGE = {
    "environment.json": [b"", b"[{", b"\0" * 40],
    "config.yaml": [b"", b"mode: [", None],
    "run.json": [b"", b"\0\0", None],
    "metrics.jsonl": [b"\0\0\0\n", b'{"step": 9', b"garbage\n"],
    "rollouts.jsonl": [b"\0\0\0\n", b"garbage\n"],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_torn_file_beside_the_checkpoints_does_not_stop_a_resume(folder, name):
    assert train() == 0
    path = folder / "runs" / "run" / name
    for number, damage in enumerate(DAMAGE[name], 2):
        if damage is None:
            path.unlink()
        elif name.endswith(".jsonl"):
            path.write_bytes(path.read_bytes() + damage)
        else:
            path.write_bytes(damage)
        assert train("run.resume=true", f"run.steps={number}") == 0
        assert steps() == list(range(number))
        assert path.stat().st_size


def test_checkpoints_of_another_run_are_refused(folder, refused):
    assert train("run.name=other") == 0
    assert train() == 0
    (folder / "runs" / "other" / "checkpoints" / "step_1").rename(
        folder / "runs" / "run" / "checkpoints" / "step_7"
    )
    message = refused("run.resume=true", "run.steps=9")
    assert "is a checkpoint of run" in message and "step_7" in message


@pytest.mark.parametrize(
    "override, key",
    [
        ("learner.learning_rate=5e-2", "learner.learning_rate"),
        ("rollout.temperature=0.3", "rollout.temperature"),
        ("rollout.samples_per_prompt=4", "rollout.samples_per_prompt"),
        ("run.seed=1", "run.seed"),
        ("method={name: chord_mu, mu: 0.4}", "method.mu"),
        ("learner.betas=[0.5,0.5]", "learner.betas"),
        ("data.experts.options.seed=77", "data.experts"),
        ("reward.functions=[length]", "reward.functions"),
        ("learner.schedule=cosine", "learner.schedule"),
        ("rollout.staleness=1", "rollout.staleness"),
    ],
)
def test_what_would_make_it_another_run_is_refused_unless_allowed(folder, refused, override, key):
    more = (
        ("reward.options={length: {max_tokens: 8, buffer_tokens: 4}}",)
        if "length" in override
        else ()
    )
    assert train() == 0
    message = refused("run.resume=true", "run.steps=2", override, *more)
    assert f"\n  {key}" in message and "run.resume_changes" in message
    sections = "method,learner,rollout,data,reward,run.seed"
    assert (
        train("run.resume=true", "run.steps=2", override, *more, f"run.resume_changes=[{sections}]")
        == 0
    )
    assert steps() == [0, 1]


def test_data_count_by_content_and_paths_by_where_they_lead(folder, refused):
    assert train() == 0
    assert train("run.resume=true", "run.steps=2", "data.prompts.path=./d.jsonl") == 0
    (folder / "moved.jsonl").write_text(ROWS)
    assert (
        train("run.resume=true", "run.steps=3", f"data.prompts.path={folder / 'moved.jsonl'}") == 0
    )
    (folder / "d.jsonl").write_text(ROWS.replace("12=", "21="))
    message = refused("run.resume=true", "run.steps=4")
    assert "data.prompts: the content differs" in message and "d.jsonl" in message


def test_what_does_not_matter_may_differ_and_every_start_keeps_its_config(folder, capsys):
    assert train() == 0
    changes = (
        "run.steps=2",
        "run.checkpoint_every=1",
        "reward.timeout=20",
        "eval.samples=2",
        "rollout.max_sequences=32",
    )
    assert train("run.resume=true", *changes) == 0
    assert "resumed with a change: run.steps: 1 -> 2" in capsys.readouterr().out
    kept = folder / "runs" / "run" / "configs"
    assert [
        yaml.safe_load((kept / f"start_{n}.yaml").read_text())["run"]["steps"] for n in (1, 2)
    ] == [1, 2]
    assert [
        entry["resumed_from"]
        for entry in json.loads((kept.parent / "environment.json").read_text())
    ] == [None, 1]


def test_a_model_that_the_run_did_not_write_is_kept(folder):
    place = folder / "runs" / "run"
    assert train("run.save_model=true") == 0
    weights = (place / "model" / "model.safetensors").read_bytes()
    assert train("run.resume=true", "run.steps=2", "run.save_model=true") == 0
    assert (place / "model" / "model.safetensors").read_bytes() != weights and not (
        place / "model_1"
    ).exists()
    mark = json.loads((place / "run.json").read_text())
    (place / "run.json").write_text(json.dumps({**mark, "model": False}))
    assert train("run.resume=true", "run.steps=3", "run.save_model=true") == 0
    assert (place / "model_1" / "model.safetensors").is_file()
