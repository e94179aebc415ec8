"""Rewards that hang, crash, print and fork, in real worker processes: each failure is a typed
outcome of its own sample, and nothing survives close().
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards import worker_thread
from tandem.rollout.rewards.runner import RewardFailure, RewardRunner

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]
WAIT = 60  # seconds until a future that never comes fails the test

MISBEHAVE = """
import ctypes, os, signal, subprocess, sys, time

def score(completion):
    if completion == 'sleep': time.sleep(1000)
    if completion == 'deaf':
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(0.01)
    if completion == 'raise': raise KeyError('lost')
    if completion == 'nan': return float('nan')
    if completion == 'arity': return [1.0, 2.0]
    if completion == 'exit': os._exit(7)
    if completion == 'segfault': ctypes.string_at(0)
    if completion == 'print':
        for _ in range(2000): print('x' * 1000); print('y' * 1000, file=sys.stderr)
    if completion == 'torch': return 'torch' in sys.modules
    if completion == 'main': return hasattr(sys.modules['__main__'], 'pytestmark')
    return 1.0
"""

FORK = """
import os, pathlib, subprocess, sys, time

def score(completion, folder):
    folder = pathlib.Path(folder)
    if completion in ('child', 'child and hang', 'child and exit'):
        (folder / completion).write_text(str(subprocess.Popen(['sleep', '1000']).pid))
        if completion == 'child and hang': time.sleep(1000)
        if completion == 'child and exit': os._exit(3)
    if completion in ('fork', 'fork and exit'):
        pid = os.fork()
        if pid == 0: time.sleep(1000)
        (folder / completion).write_text(str(pid))
        if completion == 'fork and exit': os._exit(3)
    if completion == 'fork back' and os.fork() == 0: return -5.0
    return 1.0
"""


@pytest.fixture
def start(tmp_path):
    """RewardRunners on a given source; afterwards all are closed and no worker may be left."""
    runners, pids = [], []

    def make(source, **kwargs):
        path = tmp_path / f"reward{len(runners)}.py"
        path.write_text(source)
        config = RewardConfig(
            functions=(f"{path}:score",), **{"timeout": 2.0, "max_error_rate": 1.0, **kwargs}
        )
        runners.append(RewardRunner(config, log=tmp_path / "rewards.log"))
        pids.extend(worker.process.pid for worker in runners[-1].workers)
        return runners[-1]

    yield make
    for runner in runners:
        pids.extend(worker.process.pid for worker in runner.workers if worker.process)
        runner.close()
    for pid in pids:
        assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process exists; a zombie that waits for its parent's attention does not count."""
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Wait until a process has ended."""
    deadline = time.monotonic() + WAIT
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not alive(pid)


def submit(runner, *texts, **columns):
    return runner.submit(
        Prompt(id="p", tokens=np.zeros(1, np.int32), content="?", columns=columns),
        texts,
        [np.zeros(1, np.int32)] * len(texts),
    )


def outcomes(runner, *texts, **columns):
    return submit(runner, *texts, **columns).result(timeout=WAIT)


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("sleep", "timeout", "reward.timeout, 2 s"),
        ("deaf", "timeout", "reward.timeout, 2 s"),
        ("raise", "exception", "KeyError: 'lost'"),
        ("nan", "not_finite", "nan"),
        ("arity", "arity", "list [1.0, 2.0]"),
        ("exit", "crash", "exit code 7"),
        ("segfault", "crash", "signal SIGSEGV"),
    ],
)
def test_a_failure_costs_its_own_sample_only(start, text, kind, message):
    runner = start(MISBEHAVE)
    # one worker: what comes later is scored by its successor
    later = submit(runner, "good", text, "good"), submit(runner, "good", "good")
    first, bad, third = later[0].result(timeout=WAIT)
    assert (first.value, third.value) == (1.0, 1.0)
    assert bad.value is None and bad.error.kind == kind and message in bad.error.message
    assert [o.value for o in later[1].result(timeout=WAIT)] == [1.0, 1.0]
    assert runner.error_rate == pytest.approx(1 / 5)
    assert len(runner.first_failures) == 1 and message in runner.first_failures[0]


def test_scoring_goes_on_beside_a_call_that_hangs(start):
    runner = start(MISBEHAVE, workers=2, timeout=1000.0)
    stuck = submit(runner, "sleep")
    assert [o.value for o in outcomes(runner, *["good"] * 20)] == [1.0] * 20
    assert not stuck.done()
    began = time.monotonic()
    runner.close()
    assert stuck.cancelled() and time.monotonic() - began < WAIT


def test_close_cancels_what_waits_in_the_queue(start):
    runner = start(MISBEHAVE, timeout=1000.0)
    waiting = [submit(runner, "sleep"), submit(runner, "good"), submit(runner, "good", "sleep")]
    runner.close()
    assert all(future.cancelled() for future in waiting)
    assert submit(runner, "good").cancelled()


def test_a_group_function_that_hangs_fails_all_its_samples(start):
    runner = start(
        "import time\ndef score(completions, **kw):\n    if 'sleep' in completions: "
        "time.sleep(1000)\n    return [float(len(c)) for c in completions]"
    )
    assert [o.error.kind for o in outcomes(runner, "a", "sleep", "bb")] == ["timeout"] * 3
    assert [o.value for o in outcomes(runner, "a", "bb")] == [1.0, 2.0]


def test_prints_go_to_the_log_and_do_not_block(start, tmp_path, capfd):
    runner = start(MISBEHAVE, timeout=30.0)
    assert [o.value for o in outcomes(runner, "print", "good")] == [1.0, 1.0]
    assert capfd.readouterr() == ("", "")
    runner.close()
    log = (tmp_path / "rewards.log").read_text()
    assert log.count("x" * 1000) == 2000 and log.count("y" * 1000) == 2000


def test_a_segfault_leaves_its_stack_in_the_log(start, tmp_path):
    outcomes(start(MISBEHAVE), "segfault")
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "rewards.log").read_text()


@pytest.mark.parametrize(
    "text, kind",
    [
        ("child", None),
        ("child and hang", "timeout"),
        ("child and exit", "crash"),
        ("fork", None),
        ("fork and exit", "crash"),
    ],
)
def test_children_of_a_reward_go_with_its_worker(start, tmp_path, text, kind):
    runner = start(FORK, timeout=3.0)
    (outcome,) = outcomes(runner, text, folder=str(tmp_path))
    assert (outcome.error and outcome.error.kind) == kind
    child = int((tmp_path / text).read_text())
    if kind is None:
        assert alive(child)  # the worker lives on, and so may what it started
        runner.close()
    assert gone(child)


def test_a_fork_that_returns_into_the_worker_does_not_answer_in_its_place(start, tmp_path):
    runner = start(FORK)
    for _ in range(5):
        assert [o.value for o in outcomes(runner, "fork back", "good", folder=str(tmp_path))] == [
            1.0,
            1.0,
        ]


def test_a_worker_that_died_idle_is_replaced_at_no_cost(start):
    runner = start(MISBEHAVE)
    pid = runner.workers[0].process.pid
    os.kill(pid, signal.SIGKILL)
    assert gone(pid)
    assert [o.value for o in outcomes(runner, "good")] == [1.0]


def test_too_many_failures_stop_the_run(start):
    runner = start(MISBEHAVE, max_error_rate=0.05)
    assert [o.value for o in outcomes(runner, *["good"] * 18)] == [1.0] * 18
    with pytest.raises(RewardFailure, match=r"(?s)2 of 20 samples.*KeyError: 'lost'.*SIGSEGV"):
        outcomes(runner, "raise", "segfault")
    with pytest.raises(RewardFailure):
        submit(runner, "good")


def test_workers_stay_light_and_do_not_run_the_main_script(start):
    import torch  # noqa: F401  it is loaded here, as it is in a run

    assert [o.value for o in outcomes(start(MISBEHAVE), "torch", "main")] == [0.0, 0.0]


@pytest.mark.parametrize(
    "source, message",
    [
        ("import os; os._exit(9)", "killed the process that imported them.*exit code 9"),
        ("import time; time.sleep(1000)", "took longer than 1 s"),
        ("raise RuntimeError('no licence')", "(?s)cannot be imported.*RuntimeError: no licence"),
        ("def score(text): return 1", "fit no known signature"),
    ],
)
def test_a_file_that_cannot_be_imported_is_a_config_error(start, monkeypatch, source, message):
    if "sleep" in source:
        monkeypatch.setattr(worker_thread, "START_SECONDS", 1)
    with pytest.raises(ConfigError, match=message):
        start(source, workers=2)


def test_columns_that_cannot_be_sent_are_a_config_error(start):
    runner = start(MISBEHAVE)
    with (
        open(os.devnull) as file,
        pytest.raises(ConfigError, match="'p': its columns cannot be sent"),
    ):
        outcomes(runner, "good", lock=file)
    assert [o.value for o in outcomes(runner, "good")] == [1.0]


def test_mathematics_that_never_ends_is_a_timeout_and_not_a_zero():
    runner = RewardRunner(RewardConfig(functions=("math",), timeout=3.0, max_error_rate=1.0))
    try:
        hang, right = outcomes(runner, r"\boxed{9^{9^{9^{9}}}}", "0.5", answer=r"\frac{1}{2}")
    finally:
        runner.close()
    assert (hang.error.kind, right.value) == ("timeout", 1.0)


DRIVER = """
import os, sys, time
import numpy as np
from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards.runner import RewardRunner
print('started', flush=True)
runner = RewardRunner(RewardConfig(functions=(sys.argv[1],), timeout=1000.0, workers=2))
runner.submit(Prompt('p', np.zeros(1, np.int32), '?'), ['sleep'], [np.zeros(1, np.int32)])
time.sleep(0.5)
print(*(w.process.pid for w in runner.workers), flush=True)
if sys.argv[2] == 'wait': time.sleep(1000)
"""


@pytest.mark.parametrize("end", ["wait", "leave"])
def test_workers_do_not_outlive_their_parent(tmp_path, end):
    """Busy and idle worker, when the parent is killed, and when it ends without close()."""
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "reward.py").write_text(MISBEHAVE)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), f"{tmp_path / 'reward.py'}:score", end],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout.readline() == "started\n"
        pids = [int(p) for p in parent.stdout.readline().split()]
        assert len(pids) == 2
        if end == "wait":
            assert all(alive(p) for p in pids)
            parent.kill()
        parent.wait(WAIT)
        assert all(gone(p) for p in pids)
        assert parent.stdout.read() == ""  # the script ran once, not once more in each worker
    finally:
        parent.kill()
        parent.wait()


@pytest.mark.parametrize("form", ["file.py", "package.module"])
def test_a_replaced_worker_scores_with_the_code_of_the_first_one(tmp_path, monkeypatch, form):
    """Its files were changed or removed meanwhile, and the run is in another folder."""
    project = tmp_path / "project"
    name = f"scoring_{form.replace('.', '_')}"
    (project / name).mkdir(parents=True)
    (project / name / "__init__.py").write_text("")
    (project / name / "scale.py").write_text("FACTOR = 3.0\n")
    (project / f"{name}_limits.py").write_text("FACTOR = 3.0\n")
    neighbour = f"{name}_limits" if form == "file.py" else f"{name}.scale"
    source = (
        "import os\n\ndef score(completion):\n    if completion == 'exit': os._exit(7)\n    "
        f"from {neighbour} import FACTOR\n    return FACTOR\n"
    )
    (project / "reward.py").write_text(source)
    (project / name / "reward.py").write_text(source)
    monkeypatch.chdir(project)
    function = "reward.py:score" if form == "file.py" else f"{name}.reward:score"
    runner = RewardRunner(RewardConfig(functions=(function,), workers=1, max_error_rate=1.0))
    try:

        def score(text):
            return runner.submit(
                Prompt("p", np.zeros(1, np.int32), "p"), [text], [np.zeros(1, np.int32)]
            ).result(WAIT)[0]

        assert score("a").value == 3.0
        (project / "reward.py").write_text(source.replace("return FACTOR", "return -FACTOR"))
        for path in (*(project / name).glob("*.py"), project / f"{name}_limits.py"):
            path.unlink()
        monkeypatch.chdir(tmp_path)
        assert score("exit").error.kind == "crash"
        assert score("b").value == 3.0
    finally:
        runner.close()
