"""For all tests: one OpenMP thread per process, no network, and no process that outlives the
session.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TANDEM_TEST_SESSION"] = MARK = f"{os.getpid()}-{time.time_ns()}"

import psutil
import pytest

UNIT = Path(__file__).with_name("unit")
TAKE_TIME = {"whole_run", "stack", "slow", "nightly", "gpu"}


def survivors() -> list[psutil.Process]:
    """Processes other than this one that inherited this session's mark.

    Python's own resource tracker ends with this process.
    """
    found = []
    for process in psutil.process_iter():
        try:
            marked = (
                process.pid != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and process.environ().get("TANDEM_TEST_SESSION") == MARK
            )
            if marked and not {"resource_tracker", "forkserver"} & set(
                " ".join(process.cmdline()).replace(".", " ").split()
            ):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items):
    """What `make fast` runs: the unit tests that no mark says take time."""
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if UNIT in item.path.parents and not marks & TAKE_TIME:
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def no_process_left():
    yield
    # what renders chat templates is kept for the next dataset
    if "tandem.engine.data.templates" in sys.modules:
        sys.modules["tandem.engine.data.templates"].WORKER.stop()
    end = time.monotonic() + 20
    while (left := survivors()) and time.monotonic() < end:
        time.sleep(0.5)
    described = [f"{p.pid} {' '.join(p.cmdline())[:120]}" for p in left if p.is_running()]
    for process in left:
        process.kill()
    assert not described, "processes outlived the tests:\n" + "\n".join(described)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Work in an empty folder, so that models/ and runs/ of a test go there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
