"""Other models and views on DeepSpeed: as in one process, whatever the ZeRO stage."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from model_cases import NAMES, SPEC, config_of, models_of, scores, train

from tandem.engine.learner.local_engine import LocalEngine
from tandem.engine.learner.rank import LearnerRank, build_policy
from tandem.engine.model.tiny import make_tiny

pytestmark = [pytest.mark.stack, pytest.mark.nightly, pytest.mark.timeout(300)]
RANKS = 2


def run_workers(stage, folder):
    """What each rank of models_worker.py found."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).with_name("models_worker.py")
    env = {
        **os.environ,
        "PYTHONPATH": str(script.parents[1] / "support"),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    workers = []
    for rank in range(RANKS):
        log = (folder / f"rank{rank}.log").open("w")
        command = [sys.executable, script, rank, RANKS, port, stage, folder]
        words = [str(word) for word in command]
        workers.append(subprocess.Popen(words, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        for rank, worker in enumerate(workers):
            code = worker.wait(timeout=280)
            assert code == 0, (folder / f"rank{rank}.log").read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(RANKS)]


def in_one_process(folder):
    start = str(folder / "start")
    config = config_of(start, models_of(folder))
    engine = LocalEngine(build_policy(config, start, SPEC), config.learner)
    return LearnerRank(config, start, SPEC, engine)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_teachers_views_and_averages_as_in_one_process(stage, tmp_path):
    """Two ranks; a resume to the bit."""
    for seed, name in enumerate(("start", "teacher")):
        make_tiny(tmp_path / name, hidden=32, layers=2, seed=seed)
    one = in_one_process(tmp_path)
    losses = train(one, 3)
    right = scores(one)
    outs = run_workers(stage, tmp_path)
    for out in outs:
        assert out["losses"] == pytest.approx(losses, rel=1e-4)
        assert bool(out["refused"]) == (stage == 3), out["refused"]
    for name in NAMES:
        for i, expected in enumerate(right[name]):
            found = [out for out in outs if out["scores"][name][i] is not None]
            (owner,) = found
            mine = owner["scores"][name][i]
            assert np.allclose(mine, expected, atol=2e-5, equal_nan=True), name
            assert np.array_equal(mine, owner["resumed"][name][i], equal_nan=True), name
