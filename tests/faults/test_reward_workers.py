"""Worker processes of rewards that user code spoils, fills or stops: the next call finds a worker
as good as new, and the run its own files whole.
"""

import os
import signal

import numpy as np
import pytest

from tandem.engine.config.schema import RewardConfig
from tandem.engine.core.errors import ConfigError
from tandem.engine.core.types import Prompt
from tandem.rollout.rewards import limits
from tandem.rollout.rewards.log import BoundedLog
from tandem.rollout.rewards.runner import RewardRunner

WAIT = 60.0  # seconds until a test gives up

SPOIL = """
import builtins, json, os, pickle, resource, signal, sys, threading, time

def healthy():
    print('still here')
    sys.stderr.write('and here')
    assert os.getcwd() == START and sys.getrecursionlimit() == LIMIT
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    for fd in (0, 1, 2): os.fstat(fd)

START, LIMIT = os.getcwd(), sys.getrecursionlimit()

def score(completion, secret=None):
    if completion == 'ok': healthy()
    if completion == 'streams': sys.stdout.close(); sys.stderr.close()
    if completion == 'streams are None': sys.stdout = sys.stderr = None
    if completion == 'descriptors': os.close(0); os.close(1); os.close(2)
    if completion == 'all descriptors': os.closerange(0, 256)
    if completion == 'all descriptors and a file':
        os.closerange(0, 256)
        for _ in range(20): open('/dev/null', 'r+')
    if completion == 'pickle': pickle.dumps = pickle.loads = lambda *a: 1 / 0
    if completion == 'json': json.dumps = json.loads = None
    if completion == 'folder': os.chdir('/')
    if completion == 'alarm': signal.alarm(1)
    if completion == 'timer': signal.setitimer(signal.ITIMER_REAL, 0.2)
    if completion == 'recursion': sys.setrecursionlimit(50_000)
    if completion == 'modules': sys.path.clear(); sys.argv.clear(); os.environ.clear()
    if completion == 'threads':
        for _ in range(20): threading.Thread(target=time.sleep, args=(1000,)).start()
    if completion == 'signals':
        for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)
    if completion == 'interrupt': raise KeyboardInterrupt
    if completion == 'exit': raise SystemExit(3)
    if completion == 'stop': os.kill(os.getpid(), signal.SIGSTOP)
    if completion == 'real-time signal': os.kill(os.getpid(), signal.SIGRTMIN + 3)
    if completion == 'surrogate': print('\\ud83d')
    if completion == 'answers itself': os.write(int(sys.argv[1]), b'\\x00\\x00\\x00\\x04junk')
    if completion == 'fork' and os.fork() == 0: return -5.0
    return 1.0
"""


@pytest.fixture
def start(tmp_path):
    """RewardRunners on a given source, closed afterwards."""
    runners = []

    def make(source, **kwargs):
        path = tmp_path / f"reward{len(runners)}.py"
        path.write_text(source)
        config = RewardConfig(
            functions=(f"{path}:score",), **{"timeout": 20.0, "max_error_rate": 1.0, **kwargs}
        )
        runners.append(RewardRunner(config, log=tmp_path / "logs" / "rewards.log"))
        return runners[-1]

    yield make
    for runner in runners:
        runner.close()


def outcomes(runner, *texts, **columns):
    prompt = Prompt(id="p", tokens=np.zeros(1, np.int32), content="?", columns=columns)
    return runner.submit(prompt, texts, [np.zeros(1, np.int32)] * len(texts)).result(timeout=WAIT)


@pytest.mark.parametrize(
    "spoil",
    [
        "streams",
        "streams are None",
        "descriptors",
        "pickle",
        "json",
        "folder",
        "alarm",
        "timer",
        "recursion",
        "modules",
        "threads",
        "signals",
        "surrogate",
        "fork",
    ],
)
def test_a_spoiled_worker_answers_and_the_next_call_finds_it_whole(start, spoil):
    runner = start(SPOIL)
    process = runner.workers[0].process.pid
    assert [o.value for o in outcomes(runner, spoil, "ok", "ok")] == [1.0, 1.0, 1.0]
    assert runner.workers[0].process.pid == process


@pytest.mark.parametrize(
    "spoil, kind, words, timeout",
    [
        ("all descriptors", "crash", "died", 20.0),
        ("all descriptors and a file", "crash", "exit code 70", 20.0),
        ("answers itself", "crash", "sent what is no answer", 20.0),
        ("interrupt", "exception", "KeyboardInterrupt", 20.0),
        ("exit", "exception", "SystemExit", 20.0),
        ("stop", "timeout", "reward.timeout", 1.0),
        ("real-time signal", "crash", "signal 37", 20.0),
    ],
)
def test_a_worker_that_is_lost_costs_its_own_sample_only(start, spoil, kind, words, timeout):
    first, spoiled, last = outcomes(start(SPOIL, timeout=timeout), "ok", spoil, "ok")
    assert (first.value, last.value) == (1.0, 1.0)
    assert spoiled.value is None and spoiled.error.kind == kind and words in spoiled.error.message


def test_a_long_message_to_a_stopped_worker_is_given_up_in_time(start):
    runner = start("def score(completion, tests): return float(len(tests))", timeout=1.0)
    os.kill(runner.workers[0].process.pid, signal.SIGSTOP)
    (outcome,) = outcomes(runner, "a", tests="x" * 20_000_000)
    assert outcome.error.kind == "timeout"
    assert [o.value for o in outcomes(runner, "a", tests="x" * 3_000_000)] == [3e6]


def test_only_the_listed_environment_reaches_workers(start, monkeypatch):
    source = "import os\ndef score(completion): return float(completion in os.environ)"
    names = {
        "WANDB_API_KEY": 0,
        "HF_TOKEN": 0,
        "AWS_SECRET_ACCESS_KEY": 0,
        "OPENAI_API_KEY": 0,
        "MY_OWN": 0,
        "PYTHON_KEYRING_PASSWORD": 0,
        "MY_JUDGE_URL": 1,
        "HF_HUB_OFFLINE": 1,
        "OMP_NUM_THREADS": 1,
        "LC_ALL": 1,
        "TMPDIR": 1,
        "PATH": 1,
        "HOME": 1,
        "MY_TOKEN": 1,
    }
    for name in set(names) - {"PATH", "HOME", "TMPDIR"}:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    runner = start(source, environment=("MY_JUDGE_URL", "MY_TOKEN"))
    assert dict(zip(names, [o.value for o in outcomes(runner, *names)], strict=True)) == names


def test_an_error_that_speaks_of_a_withheld_variable_says_how_to_pass_it(start, monkeypatch):
    monkeypatch.setenv("MY_JUDGE_URL", "http://judge")
    source = "import os\ndef score(completion): return float(len(os.environ['MY_JUDGE_URL']))"
    (outcome,) = outcomes(start(source), "a")
    assert "set reward.environment=[MY_JUDGE_URL]" in outcome.error.message
    assert outcomes(start(source, environment=("MY_JUDGE_URL",)), "a")[0].value == 12.0
    with pytest.raises(ConfigError, match=r"set reward.environment=.MY_JUDGE_URL"):
        start("import os\nURL = os.environ['MY_JUDGE_URL']\ndef score(completion): return 1.0")


def test_a_variable_that_is_not_set_is_refused(start):
    with pytest.raises(ConfigError, match=r"reward.environment names 'NOT_SET_ANYWHERE'"):
        start("def score(completion): return 1.0", environment=("NOT_SET_ANYWHERE",))


def test_a_call_that_takes_too_much_memory_is_ended_and_says_so(start):
    source = (
        "import time\ndef score(completion):\n    if completion == 'much':\n        held = "
        "bytearray(600 << 20)\n"
        "        held[::4096] = b'1' * len(held[::4096])\n        time.sleep(1000)\n    return 1.0"
    )
    good, much, after = outcomes(start(source, memory_gib=0.4), "a", "much", "a")
    assert (good.value, after.value) == (1.0, 1.0)
    assert (
        much.error.kind == "crash"
        and "more than the 0.4 GiB of reward.memory_gib" in much.error.message
    )


def test_memory_of_a_child_counts(start):
    source = (
        "import subprocess, sys\ndef score(completion):\n    if completion == 'much':\n"
        "        subprocess.run([sys.executable, '-c', 'import time; held = b\"1\" * (600 << "
        "20); time.sleep(1000)'])\n    return 1.0"
    )
    much, after = outcomes(start(source, memory_gib=0.4), "much", "a")
    assert (
        much.error.kind == "crash"
        and "reward.memory_gib" in much.error.message
        and after.value == 1.0
    )


def test_a_worker_that_leaks_is_replaced_and_no_sample_is_lost(start, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "WARM_CALLS", 2)
    monkeypatch.setattr(limits, "GROWTH_BYTES", 60 << 20)
    runner = start(
        "held = []\ndef score(completion):\n    held.append(b'1' * (25 << 20))\n    return "
        "float(len(held))"
    )
    counts = [o.value for o in outcomes(runner, *["a"] * 10)]
    assert max(counts) < 10 and counts.count(1.0) > 1
    runner.close()
    assert "was replaced: it has grown" in (tmp_path / "logs" / "rewards.log").read_text()


def test_what_a_worker_loads_in_its_first_calls_is_no_growth(start, monkeypatch):
    monkeypatch.setattr(limits, "GROWTH_BYTES", 60 << 20)
    runner = start(
        "held = []\ndef score(completion):\n    if not held: held.append(b'1' * (200 << "
        "20))\n    return 1.0"
    )
    process = runner.workers[0].process.pid
    assert [o.value for o in outcomes(runner, *["a"] * (limits.WARM_CALLS + 5))] == [1.0] * (
        limits.WARM_CALLS + 5
    )
    assert runner.workers[0].process.pid == process


def test_the_log_stops_at_its_limit_and_scoring_goes_on(start, tmp_path):
    runner = start("def score(completion):\n    print('x' * 20_000_000)\n    return 1.0")
    assert [o.value for o in outcomes(runner, "a", "b")] == [1.0, 1.0]
    runner.close()
    log = (tmp_path / "logs" / "rewards.log").read_text()
    assert len(log) < 17_000_000 and log.endswith("nothing more is written to it]\n")


def test_a_long_log_of_an_earlier_start_is_put_aside(tmp_path):
    path = tmp_path / "rewards.log"
    path.write_bytes(b"a" * 60)
    log = BoundedLog(path, limit=100)
    log.write(b"b" * 150)
    log.write(b"c")
    assert (tmp_path / "rewards.log.1").read_bytes() == b"a" * 60
    assert path.read_bytes().startswith(b"b" * 100 + b"\n[the log has reached 100 bytes")
    again = BoundedLog(tmp_path / "new.log", limit=100)
    again.write(b"first")
    assert BoundedLog(tmp_path / "new.log", limit=100).size == 5


def test_a_log_that_cannot_be_written_does_not_stop_scoring(start, tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rewards.log").symlink_to("/dev/full")
    runner = start("def score(completion):\n    print('x' * 100_000)\n    return 1.0")
    assert [o.value for o in outcomes(runner, "a", "b")] == [1.0, 1.0]


@pytest.mark.parametrize(
    "source",
    [
        "def score(completion, answer): return float(completion == answer)",
        (
            "def score(completions, answer, **kw):\n    for c, a in zip(completions, answer): "
            "yield {'4': 1.0, '5': None}.get(c, 1e39)"
        ),
        (
            "def score(solution_str, ground_truth, data_source): return {'score': 1 / "
            "(len(solution_str) - 1)}"
        ),
    ],
)
def test_inline_and_in_workers_the_outcomes_are_the_same(start, source):
    runner = start(source)
    inline = RewardRunner(runner.config, inline=True)
    texts, columns = ("4", "5", "44"), {"answer": "4", "note": "half \ud83d"}
    assert outcomes(inline, *texts, **columns) == outcomes(runner, *texts, **columns)
