"""Who owns a folder: starts at one moment, owners on other machines, dead ones, disks without
flock.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from tandem.engine.core import folder_lock
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.folder_lock import LOCK, FolderTaken, Owner, owned, owned_from_beside

RACER = """
import sys
from pathlib import Path
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.folder_lock import owned
print("ready", flush=True)
sys.stdin.readline()
try:
    with owned(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print(error, flush=True)
"""
ELSEWHERE = replace(Owner.here(), pid=7, host="elsewhere", boot="another kernel")


def quiet(text: str) -> None:
    pass


def write(folder, owner: Owner, age: float) -> None:
    path = folder / LOCK
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))


def test_of_many_starts_at_one_moment_one_wins_and_the_others_name_it(tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = {racer.pid: racer.stdout.readline() for racer in racers}
    (winner,) = [pid for pid, text in said.items() if text == "won\n"]
    assert all(
        f"in use by process {winner} on host" in text for pid, text in said.items() if pid != winner
    )
    for racer in racers:
        racer.communicate("end\n")
    assert os.listdir(tmp_path) == []


def test_twice_in_one_process(tmp_path):
    with (
        owned(tmp_path, quiet),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
        owned(tmp_path, quiet),
    ):
        pass
    with owned(tmp_path, quiet):
        pass


@pytest.mark.parametrize(
    "owner",
    [
        ELSEWHERE,
        replace(ELSEWHERE, boot=folder_lock.boot_id()),
        replace(ELSEWHERE, pid=os.getpid()),
    ],
)
def test_a_record_that_is_old_does_not_count_whoever_wrote_it(tmp_path, owner):
    write(tmp_path, owner, age=2 * folder_lock.STALE_SECONDS)
    told = []
    with owned(tmp_path, told.append):
        assert folder_lock.read_owner(tmp_path / LOCK).pid == os.getpid()
    assert f"process {owner.pid} on host elsewhere" in told[0]


def test_a_record_of_another_machine_is_watched_until_it_is_old(tmp_path, monkeypatch):
    """A disk whose flock does not reach the other machine: here nobody has it, and the file was
    touched a moment ago.
    """
    monkeypatch.setattr(folder_lock, "STALE_SECONDS", 0.5)
    write(tmp_path, ELSEWHERE, age=0)
    with owned(tmp_path, quiet):
        pass


BEATER = """
import os, sys, time
while True:
    os.utime(sys.argv[1])
    print("beat", flush=True)
    time.sleep(0.1)
"""


def test_a_record_of_another_machine_that_beats_is_alive(tmp_path, capsys):
    write(tmp_path, ELSEWHERE, age=0)
    beater = subprocess.Popen(
        [sys.executable, "-c", BEATER, str(tmp_path / LOCK)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert beater.stdout.readline() == "beat\n"
        with (
            pytest.raises(ConfigError, match="in use by process 7 on host elsewhere"),
            owned(tmp_path, quiet),
        ):
            pass
    finally:
        beater.kill()
        beater.communicate()
    assert "watching" in capsys.readouterr().err
    assert folder_lock.read_owner(tmp_path / LOCK) == ELSEWHERE


def test_an_owner_that_lost_its_folder_writes_no_more(tmp_path):
    """Stopped for so long that another machine took the folder; a lock file that somebody removed
    is no owner.
    """
    with owned(tmp_path, quiet) as lock:
        lock.check()
        (tmp_path / LOCK).unlink()
        lock.check()
        write(tmp_path, ELSEWHERE, age=0)
        with pytest.raises(FolderTaken, match="owned by process 7 on host elsewhere"):
            lock.check()
    assert (tmp_path / LOCK).exists()  # the other's


def test_the_target_of_an_export_has_an_owner_before_it_exists(tmp_path):
    out = tmp_path / "new" / "out"
    with owned_from_beside(out):
        with (
            pytest.raises(ConfigError, match=f"{out} is in use by process"),
            owned_from_beside(out),
        ):
            pass
        assert not out.exists()
    assert os.listdir(out.parent) == []


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written to"), owned(tmp_path / "file", quiet):
        pass
    with (
        pytest.raises(ConfigError, match="cannot be written to"),
        owned_from_beside(tmp_path / "file" / "out"),
    ):
        pass
