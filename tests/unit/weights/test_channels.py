"""Buffers through the CPU channels: every worker gets every byte, whoever is slow, and a peer that
is not there is an error, not a wait without end.
"""

import os
import socket
import threading
import time

import pytest
import torch

from tandem.engine.config.schema import ClusterConfig, Config, SyncConfig
from tandem.engine.core.errors import SyncError
from tandem.engine.weights.channels import SLOTS, Gloo, Memory, open_store
from tandem.engine.weights.transport import transport

SIZES = [5000, 1, 70_000, 70_000, 123, 70_000]


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return "127.0.0.1", s.getsockname()[1]


def fill(size, number):
    return torch.randint(
        256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number)
    )


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_two_workers_get_every_buffer_also_the_slow_one(address, kind):
    """Three updates over one connection.

    A worker reads its buffer late, when the learner would have filled that place again if it did
    not wait.
    """
    store = open_store(*address, 3, 20.0, master=True)
    memory = Memory(store, 2, max(SIZES)) if kind == "shm" else None
    wrong = []

    def work(rank):
        mine = open_store(*address, 3, 20.0, master=False)
        channel = (
            Memory(mine, 2, max(SIZES), memory.source)
            if kind == "shm"
            else Gloo(mine, rank, 3, 20.0)
        )
        for update in range(3):
            for number, buffer in enumerate(channel.receive(SIZES)):
                time.sleep(0.02 if rank == 2 else 0)
                if not torch.equal(buffer, fill(SIZES[number], 10 * update + number)):
                    wrong.append((rank, update, number))

    workers = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in (1, 2)]
    for worker in workers:
        worker.start()
    channel = memory or Gloo(store, 0, 3, 20.0)
    for update in range(3):
        for number, size in enumerate(SIZES):
            buffer = channel.next_buffer(size, lambda: None)
            buffer.copy_(fill(size, 10 * update + number))
            channel.publish(buffer, lambda: None)
    for worker in workers:
        worker.join(20)
    assert not wrong and not any(worker.is_alive() for worker in workers)
    channel.close()


def test_the_learner_gives_up_when_waiting_cannot_succeed(address):
    """No worker takes anything: the first buffers have room, the next has to wait forever."""

    class Enough(Exception):
        pass

    def stuck():
        raise Enough

    channel = Memory(open_store(*address, 2, 5.0, master=True), 1, 100)
    for _ in range(SLOTS):
        channel.publish(channel.next_buffer(100, stuck), stuck)
    with pytest.raises(Enough):
        channel.next_buffer(100, stuck)
    channel.close()


def test_memory_of_another_machine_is_named_as_such(address):
    store, other = open_store(*address, 2, 5.0, master=True), os.open(os.devnull, os.O_RDWR)
    # no process has this number; a file of that number is another one
    for source in ((2**22 + 1, 3), (os.getpid(), other)):
        with pytest.raises(SyncError, match=r"one machine.*sync.transport=gloo"):
            Memory(store, 1, 100, source)
    os.close(other)


@pytest.mark.parametrize(
    "cluster, expected",
    [
        ({}, "shm"),
        ({"address": "auto"}, "gloo"),
        ({"engine_gpus": 1, "learner_gpus": 1}, "nccl"),
        ({"engine_gpus": 0.5, "learner_gpus": 0.5, "colocate": True}, "ipc"),
    ],
)
def test_the_transport_fits_the_devices_unless_it_is_chosen(cluster, expected):
    assert transport(Config(cluster=ClusterConfig(**cluster))) == expected
    assert (
        transport(Config(cluster=ClusterConfig(**cluster), sync=SyncConfig(transport="gloo")))
        == "gloo"
    )
