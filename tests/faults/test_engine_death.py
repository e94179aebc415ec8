"""Two real vLLM engines in Ray actors: both hold the same weights after a sync; one is killed in
the middle of its work and in the middle of a transfer. Three engine starts and one restart in all;
the tests run in order and build on each other.
"""

import os
import signal
import socket
import time
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tandem.engine.config.schema import ClusterConfig, Config, DataConfig, RolloutConfig, SyncConfig
from tandem.engine.core.errors import EngineDied, RolloutPoolExhausted, SyncError
from tandem.engine.core.types import Finish, GenRequest, Prompt, Sampling, Source
from tandem.engine.model.tiny import make_tiny
from tandem.rollout.pool import EnginePool

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]

CONFIG = Config(
    data=DataConfig(max_prompt_tokens=64),
    rollout=RolloutConfig(max_tokens=900, kv_cache_gib=0.25, max_restarts=1),
    sync=SyncConfig(timeout=30.0, bucket_mib=1),
    cluster=ClusterConfig(engines=2, engine_cpus=0.5, learner_cpus=0.5, pin_cores=True),
)


class Rig:
    def __init__(self, folder):
        from transformers import AutoModelForCausalLM

        from tandem.launch import placement

        model_path = str(make_tiny(folder / "tiny"))
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        self.run_dir = folder / "run"
        self.placement = placement.start(CONFIG, self.run_dir)
        self.pool = EnginePool.start(CONFIG, model_path, self.placement, self.run_dir)
        self.groups = 0

    def submit(self, count, samples=4, **sampling):
        self.groups += count
        return [
            self.pool.submit(
                GenRequest(
                    self.groups - i,
                    Prompt("p", np.array([1, 20, 21, 22], np.int32), ""),
                    samples,
                    Sampling(**{"max_tokens": 16, "seed": 3} | sampling),
                )
            )
            for i in range(count)
        ]

    def ask(self, method):
        import ray

        return ray.get(
            [getattr(handle, method).remote() for handle in self.pool.handles], timeout=60
        )

    def connect(self):
        from vllm.distributed.weight_transfer.base import ModuleSource

        from tandem.engine.weights.sender import trainer_engine

        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        return trainer_engine(
            "shm", 0, self.pool.handles, ModuleSource(self.model), "127.0.0.1", port, CONFIG.sync
        )


@pytest.fixture(scope="module")
def rig(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("GLOO_SOCKET_IFNAME", "lo")
    rig = Rig(tmp_path_factory.mktemp("pool"))
    started = [pid for pids in rig.ask("process_ids") for pid in pids]
    yield rig
    started += [pid for pids in rig.ask("process_ids") for pid in pids]
    rig.pool.close()
    assert_gone(started)
    rig.placement.close()
    patch.undo()


def assert_gone(pids):
    """A killed engine's vLLM process needs a moment to notice."""
    deadline = time.monotonic() + 20
    while left := [
        p
        for p in pids
        if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE
    ]:
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.1)


def test_engines_share_the_work_and_agree(rig):
    with torch.no_grad():
        for p in rig.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    delivery = rig.connect().send(1)
    assert [found.received for found in delivery.installed] == [delivery.sent] * 2
    assert [found.version for found in delivery.installed] == [1, 1] and len(
        {found.active_digest for found in delivery.installed}
    ) == 1
    futures = rig.submit(4)
    loads = [[p.request.group for p in slot.pending.values()] for slot in rig.pool.slots]
    # by load, ties by index: the same every time
    assert loads == [[4, 2], [3, 1]]
    for future in futures:
        (_group,) = {t.group for t in future.result(60)}
        assert all((t.version[t.source == Source.POLICY] == 1).all() for t in future.result())
    stats = rig.pool.stats()
    assert stats["engines"] == 2 and stats["busy_seconds"] > 0
    assert stats["generated_tokens"] == sum(
        (t.source == Source.POLICY).sum() for f in futures for t in f.result()
    )
    pinned(rig)
    # vLLM's output is in a file, not on the terminal
    assert Path(rig.run_dir, "logs/engine_1.log").stat().st_size > 0


def pinned(rig):
    """cluster.pin_cores: each engine has a core of its own, for all threads of its actor and of
    vLLM's process.
    """
    for pids, core in zip(rig.ask("process_ids"), sorted(os.sched_getaffinity(0)), strict=False):
        threads = [thread.id for pid in pids for thread in psutil.Process(pid).threads()]
        assert (
            len(pids) == 2
            and len(threads) > 10
            and all(os.sched_getaffinity(thread) == {core} for thread in threads)
        )


def test_an_aborted_request_frees_its_engine(rig):
    before = rig.pool.stats()
    # one for each engine
    doomed, kept = rig.submit(2, samples=16, max_tokens=900, min_tokens=900)
    time.sleep(0.5)
    (pending,) = rig.pool.slots[0].pending.values()
    rig.pool.abort(pending.request)
    tail = doomed.result(10)
    assert (
        len(tail) == 16
        and {t.finish for t in tail} == {Finish.ABORT}
        and not rig.pool.slots[0].pending
        and rig.pool.slots[0].busy_since is None
    )
    assert not kept.done() and rig.pool.slots[1].load == 16
    (again,) = rig.submit(1)
    assert [p.result for p in rig.pool.slots[0].pending.values()] in ([again], []), (
        "the next request goes where the aborted one was"
    )
    assert len(again.result(60)) == 4 and len(kept.result(60)) == 16
    sampled = sum(
        (t.source == Source.POLICY).sum()
        for future in (doomed, kept, again)
        for t in future.result()
    )
    assert rig.pool.stats()["generated_tokens"] - before["generated_tokens"] == sampled, (
        "those of the aborted request count"
    )
    rig.pool.abort(pending.request)  # answered long ago


def test_engine_killed_mid_group(rig):
    victim, _survivor = rig.ask("process_ids")
    futures = rig.submit(2, samples=32, max_tokens=900, min_tokens=900)
    time.sleep(0.2)
    # the actor; vLLM's process must not outlive it
    os.kill(victim[0], signal.SIGKILL)
    wait(futures, timeout=60)
    with pytest.raises(EngineDied, match="engine 0"):
        futures[0].result(1)
    # the other engine's group is not touched
    assert len(futures[1].result(60)) == 32
    assert len(rig.pool.handles) == 1
    assert rig.pool.restart_dead() == 1 and len(rig.pool.handles) == 2
    pinned(rig)  # the new one too
    assert_gone(victim)

    fresh, current = rig.submit(2)
    # it has the original weights
    with pytest.raises(SyncError, match="engine 0 was restarted"):
        fresh.result(60)
    assert len(current.result(60)) == 4
    delivery = rig.connect().send(2)
    assert [found.received for found in delivery.installed] == [delivery.sent] * 2 and len(
        {found.active_digest for found in delivery.installed}
    ) == 1
    for future in rig.submit(2):
        assert all((t.version[t.source == Source.POLICY] == 2).all() for t in future.result(60))


def test_engine_killed_mid_transfer(rig):
    sender = rig.connect()
    victim = rig.ask("process_ids")[0]

    class Trap:
        """Kills an engine when the first tensors are on their way."""

        def metadata(self):
            return inner.metadata()

        def __iter__(self):
            for i, pair in enumerate(inner):
                if i == 5:
                    # vLLM's process; the actor lives and has to notice
                    os.kill(victim[1], signal.SIGKILL)
                yield pair

    inner, sender.source.source = sender.source.source, Trap()
    begin = time.monotonic()
    with pytest.raises(EngineDied):
        sender.send(3)
    # vLLM itself would leave the call unanswered for ever
    assert time.monotonic() - begin < CONFIG.sync.timeout
    # the survivor is stuck in the update, so it counts as dead as well
    with pytest.raises(RolloutPoolExhausted, match=r"engine 0: .*\n.*engine 1: "):
        rig.pool.restart_dead()
    with pytest.raises(EngineDied):
        rig.submit(1)[0].result(10)


def test_a_dead_engine_is_found_before_the_others_begin_an_update(rig):
    """Else every engine that lives would be left in the middle of an update and have to be
    restarted as well. Plain actors: only who is called counts.
    """
    import ray

    from tandem.engine.weights.client import PoolClient

    @ray.remote(num_cpus=0)
    class Engine:
        begun = False

        def transfer_ranks(self):
            return 1

        def health(self):
            pass

        def start_weight_update(self):
            self.begun = True

        def updating(self):
            return self.begun

    engines = [Engine.remote() for _ in range(2)]
    client = PoolClient(engines, 30.0)
    ray.kill(engines[1])
    with pytest.raises(ray.exceptions.RayActorError):  # the kill takes effect a moment later
        while True:
            ray.get(engines[1].health.remote(), timeout=30)
    with pytest.raises(EngineDied, match="engine 1"):
        client.start_weight_update()
    assert not ray.get(engines[0].updating.remote(), timeout=30)
