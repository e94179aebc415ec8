"""Not a test: a process that imports everything once and forks one child per case. A child trains and sends itself a signal at
one point of the run. Usage: signal_cases.py FOLDER CASES.json; prints {case: {code, err, ...}} as JSON.

A case: {"at": a name of POINTS, "signals": [names], "words": what follows `tandem` on the command line}
"""
import contextlib
import gc
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from tandem.engine import run, telemetry
from tandem.engine.learner import InlineLearner, LearnerRank
from tandem.launch import cli
from tandem.rollout.hf_backend import HFBackend
from tandem.rollout.local import LocalPool
from tandem.rollout.rewards.api import RewardFunction

# where the signal comes: as this function is called for the n-th time. An evaluation generates once and scores 2 samples, a step
# generates once and scores 6, a checkpoint saves and exports once.
POINTS = {
    "config": (cli, "preflight", 1),
    "prepare": (run.Run, "prepare", 1),
    "start": (LocalPool, "start", 1),
    "learner start": (InlineLearner, "start", 1),
    "first sync": (run.Run, "sync", 1),
    "evaluation before": (run.Run, "evaluate", 1),
    "evaluating": (HFBackend, "generate_all", 1),
    "first rollouts": (HFBackend, "generate_all", 2),
    "rollouts": (HFBackend, "generate_all", 4),
    "scoring": (RewardFunction, "__call__", 2 + 6 + 3),
    "learning": (LearnerRank, "step", 2),
    "report": (run.Run, "report", 2),
    "writing a checkpoint": (LearnerRank, "save", 1),
    "sealing a checkpoint": (LearnerRank, "export", 1),
    "last evaluation": (HFBackend, "generate_all", 5),
    "export": (LearnerRank, "export", 2),
    "closing": (telemetry.Telemetry, "close", 1),
    "copying": (shutil, "copytree", 1),
}


def arm(point: str, numbers: list[int]) -> None:
    """Send the signals to this process at the point."""
    owner, name, count = POINTS[point]
    if not hasattr(owner, name):
        raise SystemExit(f"{owner} has no {name}: mend POINTS")
    raw = owner.__dict__[name]
    original, calls = getattr(owner, name), 0

    def stand_in(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*args, **options)
    setattr(owner, name, staticmethod(stand_in) if isinstance(raw, (classmethod, staticmethod)) else stand_in)


def child(case: dict, folder: Path) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), stream)
    if case["at"]:
        arm(case["at"], [signal.Signals[name] for name in case["signals"]])
    sys.argv = ["tandem", *case["words"]]
    code = cli.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)      # the interpreter's own end would look at every module: seconds for all cases


def main() -> None:
    root, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        cli.main(["train", "c.yaml", "run.name=warm", "run.steps=1"])       # what is imported late is imported once
    gc.freeze()
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        folder = root / f"case_{number}"
        folder.mkdir()
        process = os.fork()
        if process == 0:
            child(case, folder)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found[name] = {"code": code, "out": (folder / "out").read_text(), "err": (folder / "err").read_text()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
