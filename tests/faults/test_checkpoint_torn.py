"""Whatever happens while a checkpoint is written, or to its files later: the newest complete one is
found, and nothing else is taken for one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.engine.loop.checkpoint import MANIFEST, Checkpoints

# Kills itself with SIGKILL at its n-th file system call, for n = 1, 2, ... until a child lives to
# the end; after each death the parent looks what is left.
KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
from tandem.engine.loop.checkpoint import Checkpoints

WATCHED = {"open", "shutil.rmtree"}
WATCHED |= {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}

def write(checkpoints, step, content):
    with checkpoints.write(step) as folder:
        (folder / "learner").mkdir()
        for name in ("a.bin", "learner/b.bin"):
            (folder / name).write_text(content)

def child(root, n, pipe):
    calls = 0
    def hook(event, args):
        nonlocal calls
        if event in WATCHED:
            calls += 1
            if calls == n:
                os.kill(os.getpid(), signal.SIGKILL)
    checkpoints = Checkpoints(root, keep=1)
    sys.addaudithook(hook)
    for step, content in ((2, "two"), (2, "two again"), (3, "three")):
        write(checkpoints, step, content)
        os.write(pipe, b".")
    os._exit(0)

base, n, died = Path(sys.argv[1]), 0, 0
order = ["one", "two", "two again", "three"]
while True:
    n += 1
    root = base / str(n)
    write(Checkpoints(root, keep=1), 1, "one")
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        child(root, n, write_end)
    os.close(write_end)
    _, status = os.waitpid(pid, 0)
    finished = len(os.read(read_end, 10))
    os.close(read_end)
    said = []
    found = Checkpoints(root, keep=1, report=said.append).latest()
    assert found is not None, (n, os.listdir(root))
    step, path = found
    contents = {(path / name).read_text() for name in ("a.bin", "learner/b.bin")}
    assert len(contents) == 1, (n, contents)
    # a write that returned is never lost
    assert order.index(contents.pop()) >= finished, (n, finished, os.listdir(root))
    write(Checkpoints(root, keep=1), 9, "after the crash")
    assert sorted(os.listdir(root)) == ["step_9"], (n, os.listdir(root))
    shutil.rmtree(root)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0 and finished == 3
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    died += 1
print(json.dumps(died))
"""


def test_killed_at_every_file_system_call(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) > 30  # so many places to die were tried


def two_checkpoints(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep=5)
    for step in (4, 8):
        with checkpoints.write(step) as tmp:
            (tmp / "weights").mkdir()
            (tmp / "weights" / "model.safetensors").write_bytes(bytes(range(256)) * 64)
            (tmp / "run_state.pkl").write_bytes(b"state of step %d" % step)
    return checkpoints


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated file": (
        lambda p: os.truncate(p / "weights/model.safetensors", 100),
        "model.safetensors has 100 bytes, its manifest says 16384",
    ),
    "grown file": (
        lambda p: (p / "run_state.pkl").open("ab").write(b"x"),
        "run_state.pkl has 16 bytes",
    ),
    "flipped bit": (
        lambda p: flip(p / "weights/model.safetensors", 9999),
        "model.safetensors has digest",
    ),
    "missing file": (
        lambda p: (p / "weights/model.safetensors").unlink(),
        "lacks weights/model.safetensors",
    ),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "was not written to the end"),
    "torn manifest": (lambda p: os.truncate(p / MANIFEST, 60), "cannot be read"),
    "flipped bit in the manifest's digest": (
        lambda p: flip(p / MANIFEST, (p / MANIFEST).read_bytes().index(b'"blake2b": "') + 20),
        "has digest",
    ),
    "manifest of another step": (
        lambda p: (p / MANIFEST).write_bytes((p.parent / "step_4" / MANIFEST).read_bytes()),
        "holds the manifest of step 4",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, name):
    damage, reason = DAMAGE[name]
    checkpoints = two_checkpoints(tmp_path)
    said = []
    checkpoints.report = said.append
    assert checkpoints.latest()[0] == 8 and said == []
    damage(tmp_path / "step_8")
    step, path = checkpoints.latest()
    assert step == 4 and (path / "run_state.pkl").read_bytes() == b"state of step 4"
    assert len(said) == 1 and "step_8" in said[0] and reason in said[0], said


def test_every_checkpoint_damaged_means_none(tmp_path):
    checkpoints = two_checkpoints(tmp_path)
    for step in (4, 8):
        (tmp_path / f"step_{step}" / "run_state.pkl").unlink()
    said = []
    checkpoints.report = said.append
    assert checkpoints.latest() is None and len(said) == 2


WRITER = """
import resource, signal, sys
from tandem.engine.loop.checkpoint import Checkpoints
if sys.argv[2] == "limit":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
checkpoints = Checkpoints(sys.argv[1], keep=1)
with checkpoints.write(1) as folder:
    (folder / "weights").write_bytes(b"1" * 50_000)
try:
    with checkpoints.write(2) as folder:
        (folder / "weights").write_bytes(b"2" * 2_000_000)
except OSError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize("how", ["limit", "tmpfs"])
def test_full_disk(tmp_path, how):
    """A disk that fills up in the middle of a write: the error says what became of the checkpoints,
    and the one before is found.
    """
    mounted = (
        how == "tmpfs"
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
        ).returncode
        == 0
    )
    if how == "tmpfs" and not mounted:
        pytest.skip("may not mount a small disk here")
    try:
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(tmp_path), how],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 3, done.stderr
        assert "checkpoint of step 2" in done.stdout and "are intact" in done.stdout
        assert os.listdir(tmp_path) == ["step_1"]
        assert Checkpoints(tmp_path, keep=1).latest() == (1, tmp_path / "step_1")
    finally:
        if mounted:
            subprocess.run(["umount", str(tmp_path)], check=True)
