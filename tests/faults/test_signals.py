"""Signals at every point of a command: what the exit code is, what is said, and what is left on
disk.
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
from forked_cases import CONFIG, run_cases

from tandem.engine.core import stop

BEFORE = ["config", "prepare", "start", "learner start", "first sync"]
# where the signal comes, and the steps done in the checkpoint that must be there afterwards
DURING = {
    "evaluation before": 0,
    "evaluating": 0,
    "first rollouts": 0,
    "rollouts": 2,
    "scoring": 1,
    "learning": 2,
    "report": 2,
    "writing a checkpoint": 3,
    "sealing a checkpoint": 3,
    "last evaluation": 3,
}
AFTER = ["export", "closing"]
RESUMED = ["evaluation before", "rollouts", "learning", "last evaluation"]
SIGNALS = ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1"]
STORMS = {
    "twice": ["SIGTERM", "SIGTERM", "SIGUSR1"],
    "Ctrl-C twice": ["SIGINT", "SIGINT"],
    "Ctrl-C after all": ["SIGTERM", "SIGINT"],
}


def case(at: str, *signals: str, name: str = "", command: str = "train") -> dict:
    return {
        "at": at,
        "signals": list(signals),
        "words": [command, "c.yaml", f"run.name={name or at.replace(' ', '_')}"],
    }


def cases() -> dict[str, dict]:
    found = {at: case(at, "SIGTERM") for at in [*BEFORE, *DURING, *AFTER]}
    found |= {name: case("scoring", name, name=name) for name in SIGNALS}
    found |= {
        f"{name} early": case("start", name, name=name + "_early") for name in ("SIGINT", "SIGHUP")
    }
    found |= {
        name: case("learning", *signals, name=f"storm_{number}")
        for number, (name, signals) in enumerate(STORMS.items())
    }
    for at in RESUMED:
        found[f"{at}, resumed"] = {"at": "", "words": [*found[at]["words"], "run.resume=true"]}
    resumed = found["rollouts, resumed"]
    found["resumed, stopped as it starts"] = {
        "at": "start",
        "signals": ["SIGTERM"],
        "words": [*found["SIGHUP"]["words"], "run.resume=true"],
    }
    found["eval"] = case("evaluating", "SIGTERM", command="eval")
    found["copying"] = {
        "at": "copying",
        "signals": ["SIGTERM"],
        "words": ["export", f"runs/{resumed['words'][2][9:]}", "out"],
    }
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{case: {code, out, err}} and the folder in which all ran."""
    folder = tmp_path_factory.mktemp("signals")
    return run_cases(folder, cases()), folder


def checkpoints(folder: Path, name: str) -> list[str]:
    return sorted(path.name for path in (folder / "runs" / name / "checkpoints").glob("*"))


@pytest.mark.parametrize("at", BEFORE)
def test_before_the_first_step_there_is_nothing_to_resume_from(results, at):
    found, folder = results
    assert found[at]["code"] == 143, found[at]
    assert (
        found[at]["err"]
        == "stopped by SIGTERM before the first step; there is nothing to resume from\n"
    )
    assert "go on" not in found[at]["out"] and not checkpoints(folder, at.replace(" ", "_"))


@pytest.mark.parametrize("at", DURING)
def test_in_the_loop_there_is_a_checkpoint(results, at):
    found, folder = results
    assert found[at]["code"] == 75, found[at]
    assert "go on with run.resume" in found[at]["out"] and not found[at]["err"]
    assert f"after {DURING[at]} steps" in found[at]["out"]
    assert f"step_{DURING[at]}" in checkpoints(folder, at.replace(" ", "_"))


@pytest.mark.parametrize("at", RESUMED)
def test_the_resumed_run_has_every_step_and_evaluation_once(results, at):
    found, folder = results
    assert found[f"{at}, resumed"]["code"] == 0, found[f"{at}, resumed"]
    run = folder / "runs" / at.replace(" ", "_")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    order = [("eval" if "eval/accuracy" in line else "step", line["step"]) for line in lines]
    assert order == [("eval", 0), ("step", 0), ("step", 1), ("step", 2), ("eval", 3)]
    assert (run / "model" / "config.json").exists()


@pytest.mark.parametrize("at", AFTER)
def test_a_run_that_only_has_to_close_is_done(results, at):
    found, folder = results
    assert found[at]["code"] in (0, 75), found[at]
    run = folder / "runs" / at.replace(" ", "_")
    assert checkpoints(folder, run.name) == ["step_3"] and (run / "model" / "config.json").exists()


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_counts(results, name):
    found, folder = results
    assert found[name]["code"] == (130 if name == "SIGINT" else 75), found[name]
    assert f"stopped by {name} after 1 steps; go on with run.resume=true" in found[name]["out"]
    assert checkpoints(folder, name) == ["step_1"]
    early = found.get(f"{name} early")
    if early:
        assert (
            early["code"] == (130 if name == "SIGINT" else 143)
            and f"stopped by {name} before" in early["err"]
        )


def test_more_of_the_same_change_nothing_but_a_second_ctrl_c_stops_at_once(results):
    found, folder = results
    assert found["twice"]["code"] == 75 and checkpoints(folder, "storm_0") == ["step_2"]
    for number, name in ((1, "Ctrl-C twice"), (2, "Ctrl-C after all")):
        assert found[name]["code"] == 130, found[name]
        assert "go on" not in found[name]["out"] and found[name]["err"].endswith("interrupted\n")
        assert not checkpoints(folder, f"storm_{number}")


def test_a_resumed_run_that_is_stopped_as_it_starts_is_still_resumable(results):
    found, folder = results
    stopped = found["resumed, stopped as it starts"]
    assert stopped["code"] == 75 and "go on with run.resume" in stopped["err"]
    assert checkpoints(folder, "SIGHUP") == ["step_1"]


def test_commands_that_do_not_train(results):
    found, folder = results
    for name in ("eval", "copying"):
        assert (
            found[name]["code"] == 143
            and found[name]["err"] == "stopped by SIGTERM before the end\n"
        )
    assert not (folder / "out").exists(), "half a model"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGXCPU"])
def test_the_others_are_handled_too(name):
    with stop.handled():
        with pytest.raises(stop.Stopped, match=name):
            os.kill(os.getpid(), signal.Signals[name])
            time.sleep(10)
        assert stop.requested() == name
    assert stop.requested() == ""


def test_a_signal_that_nohup_ignores_stays_ignored():
    code = (
        "import os, signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom "
        "tandem.engine.core import stop\n"
        "with stop.handled():\n    os.kill(os.getpid(), signal.SIGHUP)\n    "
        "print(repr(stop.requested()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "''\n", done


def test_a_signal_while_a_cpp_module_is_imported_does_not_abort_the_process(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch._C':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from tandem.launch import cli\n"
        "sys.exit(cli.main(['train', 'c.yaml']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 143 and "nothing to resume from" in done.stderr, done


def test_an_exception_lost_in_a_finalizer_is_raised_again():
    code = (
        "import os, signal\nfrom tandem.engine.core import stop\n"
        "class Finalizer:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "with stop.handled():\n    try:\n        Finalizer()\n        signal.pause()\n"
        "    except stop.Stopped as signal_name:\n        print(signal_name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout == "SIGTERM\n", done


def test_ray_gets_no_say():
    """Ray leaves by SystemExit in a handler that it puts in the place of ours."""
    code = (
        "import os, signal, sys\nfrom tandem.engine.core import stop\n"
        "def ray_init():\n"
        "    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))\n"
        "    if sys.argv[1] == 'during':\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "with stop.handled():\n    try:\n        with stop.keeping():\n            ray_init()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except stop.Stopped as error:\n        print(error)\n"
    )
    for when in ("during", "after"):
        done = subprocess.run(
            [sys.executable, "-c", code, when], capture_output=True, text=True, timeout=100
        )
        assert done.stdout == "SIGTERM\n", (when, done)
