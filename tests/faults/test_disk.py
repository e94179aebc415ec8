"""A disk that is full, before the run or in it: the old checkpoints stay, a short message names the
disk, and with room the run goes on.
"""

import json
import subprocess
from pathlib import Path

import pytest
from forked_cases import run_cases

from tandem.engine.config.schema import Config, ModelConfig
from tandem.engine.loop.disk import checkpoint_bytes, disk_fault, in_words, probe

FILLING = f"{Path(__file__).parent / 'filling_reward.py'}:score"
DISK = 40 << 20
STEP_2 = 2 + 2 * 6 + 1  # the reward's first call in step 2: 2 of the evaluation, 6 per step


def words(name: str, *more: str) -> list[str]:
    return [
        "train",
        "c.yaml",
        "run.dir=m",
        f"run.name={name}",
        "run.checkpoint_every=1",
        "run.save_model=false",
        *more,
    ]


def filling(**options) -> list[str]:
    return [f"reward.functions=[{FILLING}]", f"reward.options={json.dumps({FILLING: options})}"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: {code, out, err}} of runs on a small disk of their own, and the folder it is in."""
    folder = tmp_path_factory.mktemp("disk")
    (folder / "m").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder / "m"],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr}")
    try:
        cases = {
            "metrics": {"words": words("metrics", *filling(at=STEP_2))},
            "metrics, resumed": {
                "shell": "rm m/fill",
                "words": words("metrics", *filling(at=STEP_2), "run.resume=true"),
            },
            "no room": {
                "shell": "rm -r m/metrics; head -c 35M /dev/zero > m/fill",
                "words": words("no_room"),
            },
            "doctor": {"words": ["doctor", "c.yaml", "run.dir=m"]},
            "room for one": {"shell": "head -c 20M /dev/zero > m/fill", "words": words("one")},
            "room for one, resumed": {
                "shell": "rm m/fill",
                "words": words("one", "run.resume=true"),
            },
            "error": {
                "shell": "rm -r m/one",
                "words": words("error", *filling(at=STEP_2, fails=True), "reward.on_error=fail"),
            },
        }
        yield run_cases(folder, cases), folder
    finally:
        subprocess.run(["umount", folder / "m"], check=True)


def test_full_while_metrics_or_rollouts_are_written(results):
    found = results[0]["metrics"]
    assert found["code"] == 1, found
    (line,) = found["err"].splitlines()
    assert (
        "No space left on device" in line
        and "/m" in line
        and "MiB free" in line
        and "go on with run.resume=true" in line
    )
    assert results[0]["metrics, resumed"]["code"] == 0, results[0]["metrics, resumed"]


def test_no_room_for_one_checkpoint_is_found_before_the_run(results):
    found, _folder = results
    assert found["no room"]["code"] == 2, found["no room"]
    assert (
        "MiB are free on the disk of" in found["no room"]["err"]
        and "a checkpoint of this model takes at least 10.2 MiB" in found["no room"]["err"]
    )
    assert (
        "a checkpoint of this model takes at least 10.2 MiB" in found["doctor"]["out"]
        and found["doctor"]["code"] == 2
    )


def test_room_for_one_checkpoint_but_not_for_two(results):
    found = results[0]["room for one"]
    assert found["code"] == 1, found
    assert "warning: " in found["out"] and "the whole run about" in found["out"]
    (line,) = found["err"].splitlines()
    assert (
        "the checkpoint of step 2 could not be written" in line
        and "No space left on device" in line
    )
    assert "the newest is step_1" in line and "/m" in line and "one takes 10.3 MiB" in line
    assert results[0]["room for one, resumed"]["code"] == 0, results[0]["room for one, resumed"]


def test_an_error_of_another_kind_on_a_full_disk(results):
    found = results[0]["error"]
    assert found["code"] == 1 and "the reward's own error" in found["err"], found
    # the lock that the run gives back may leave room for the traceback
    told = "the traceback could not be kept" in found["err"] or "error.log" in found["err"]
    assert told and "Traceback" not in found["err"]


def wrapped() -> RuntimeError:
    try:
        try:
            raise OSError(122, "Disk quota exceeded", "/data/x")
        except OSError as error:
            raise RuntimeError("could not write") from error
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error, fault",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system", "/x/y"), "Read-only file system"),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            "No space left on device",
        ),
        (wrapped(), "Disk quota exceeded"),
        (OSError(2, "No such file or directory"), ""),
        (BrokenPipeError(32, "Broken pipe"), ""),
        (RuntimeError("unexpected pos 64 vs 0"), ""),
    ],
)
def test_faults_of_a_disk_are_told_from_others(tmp_path, error, fault):
    assert disk_fault(error) == fault
    assert (fault in in_words(error, tmp_path)) and bool(in_words(error, tmp_path)) == bool(fault)


def test_the_disk_is_asked_where_a_library_hides_the_reason(tmp_path):
    assert probe(tmp_path) == "" and not list(tmp_path.iterdir())
    assert probe(Path("/proc")) != ""


@pytest.mark.parametrize("dtype, expected", [("float32", 16), ("bfloat16", 14)])
def test_bytes_per_parameter_of_a_checkpoint(dtype, expected):
    config = Config(model=ModelConfig(dtype=dtype))
    assert checkpoint_bytes(config, 1000) == 1000 * expected
