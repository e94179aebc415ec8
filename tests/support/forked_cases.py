"""Not a test: a process that imports everything once and forks one child per case, which runs a
`tandem` command.

Tests call `run_cases`, which starts this file in a process of its own. A case is {"words": what
follows `tandem` on the command line} and may have
    "at", "signals"     a name of POINTS and the names of the signals that the child sends itself
                        there
    "shell"             a command that is run before
    "terminal"          a name of TERMINALS: what its standard output is
"""

import contextlib
import functools
import gc
import inspect
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

from tandem.engine.learner.inline import InlineLearner
from tandem.engine.learner.rank import LearnerRank
from tandem.engine.loop.evaluation import Evaluator
from tandem.engine.loop.reporter import Reporter
from tandem.engine.loop.sync import Sync
from tandem.engine.report import telemetry
from tandem.launch import cli
from tandem.launch.run import start
from tandem.rollout.backends.hf import HFBackend
from tandem.rollout.local import LocalPool
from tandem.rollout.rewards.api import RewardFunction

CONFIG = {
    "mode": "inline",
    "model": {"path": "tandem:tiny"},
    "data": {
        "prompts": {"path": "task:sort", "options": {"digits": 3}},
        "evaluation": {"path": "task:sort", "split": "test", "options": {"digits": 3, "size": 2}},
        "max_prompt_tokens": 32,
    },
    "method": {"name": "grpo"},
    "rollout": {"prompts_per_step": 3, "samples_per_prompt": 2, "max_tokens": 4},
    "reward": {"functions": ["exact"]},
    "run": {"steps": 3, "resume": False},
}


def run_cases(folder: Path, cases: dict[str, dict]) -> dict[str, dict]:
    """{case: {code, out, err}}; all run in `folder`, one after the other."""
    (folder / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


# where the signal comes: as this function is called for the n-th time. An evaluation generates once
# and scores 2 samples, a step generates once and scores 6, a checkpoint saves and exports once.
POINTS = {
    "config": (cli, "preflight", 1),
    "prepare": (start, "prepare", 1),
    "start": (LocalPool, "start", 1),
    "learner start": (InlineLearner, "start", 1),
    "first sync": (Sync, "publish", 1),
    "evaluation before": (Evaluator, "evaluate", 1),
    "evaluating": (HFBackend, "generate_all", 1),
    "first rollouts": (HFBackend, "generate_all", 2),
    "rollouts": (HFBackend, "generate_all", 4),
    "scoring": (RewardFunction, "__call__", 2 + 6 + 3),
    "learning": (LearnerRank, "step", 2),
    "report": (Reporter, "step", 2),
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

    async def async_stand_in(*args, **options):  # a backend's calls must be async
        return await stand_in(*args, **options)

    replacement = async_stand_in if inspect.iscoroutinefunction(original) else stand_in
    if isinstance(raw, (classmethod, staticmethod)):
        replacement = staticmethod(replacement)
    setattr(owner, name, replacement)


def closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def closed(*descriptors: int) -> None:
    """As Python finds it after `>&-`."""
    for fd in descriptors:
        os.close(fd)
        setattr(sys, ("stdin", "stdout", "stderr")[fd], None)


def full() -> None:
    for fd in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), fd)


def ascii_only() -> None:
    # it stays open as long as the process
    stream = open(1, "w", encoding="ascii", errors="strict", closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = stream


def asleep() -> None:
    """A pipe that is full, and stays so."""
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    fill(writer)
    os.dup2(writer, 1)


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, b"x")
    os.set_blocking(fd, True)


def gone() -> None:
    """A terminal whose window was closed."""
    master, slave = pty.openpty()
    os.dup2(slave, 1)
    os.close(master)


def stopped_terminal() -> None:
    """A terminal after Ctrl-S."""
    _master, slave = pty.openpty()
    fill(slave)
    os.dup2(slave, 1)


TERMINALS = {
    "closed pipe": closed_pipe,
    "closed": functools.partial(closed, 1),
    "all closed": functools.partial(closed, 0, 1, 2),
    "input closed": functools.partial(closed, 0),
    "full": full,
    "ascii": ascii_only,
    "asleep": asleep,
    "gone": gone,
    "stopped": stopped_terminal,
}


def child(case: dict, folder: Path) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), stream)
    if "shell" in case:
        subprocess.run(case["shell"], shell=True, check=True)
    if "terminal" in case:
        TERMINALS[case["terminal"]]()
    if case.get("at"):
        arm(case["at"], [signal.Signals[name] for name in case["signals"]])
    sys.argv = ["tandem", *case["words"]]
    code = cli.main()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    # the interpreter's own end would look at every module: seconds for all cases
    os._exit(code)


def main() -> None:
    root = Path(sys.argv[1])
    cases = json.loads((root / "cases.json").read_text())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        # what is imported late is imported once
        cli.main(["train", "c.yaml", "run.name=warm", "run.steps=1"])
    gc.freeze()
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        folder = root / f"case_{number}"
        folder.mkdir()
        process = os.fork()
        if process == 0:
            child(case, folder)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        found[name] = {
            "code": code,
            "out": (folder / "out").read_text(),
            "err": (folder / "err").read_text(),
        }
    (root / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
