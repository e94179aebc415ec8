"""Channels that take weights to engines on CPUs: shared memory on one machine, gloo between
machines. vLLM has neither.

    learner rank 0                                            every worker of every engine
    next_buffer(size) -> buffer, filled by the caller         for buffer in receive(sizes): ...
    publish(buffer)

A buffer that was received is good until the next one is asked for. Both sides wait no longer than
their timeout; the learner's side meanwhile calls `raise_if_stuck()`, which raises when waiting
cannot succeed.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.text import first_line

POLL = 0.0003  # seconds
NAME = "tandem_weights"
# buffers in shared memory: the learner fills one while the engines load the other
SLOTS = 2


def open_store(address: str, port: int, world_size: int, timeout: float, master: bool):
    """The key-value server through which learner (which runs it) and workers find each other."""
    return dist.TCPStore(
        address,
        port,
        world_size,
        is_master=master,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )


class Gloo:
    """Broadcast from rank 0 in a group of its own; vLLM's and DeepSpeed's default groups are not
    touched. The constructor returns when all ranks have joined.
    """

    def __init__(self, store, rank: int, world_size: int, timeout: float):
        own_store = dist.PrefixStore("tandem_weights", store)
        self.group = dist.ProcessGroupGloo(own_store, rank, world_size, timedelta(seconds=timeout))

    def start(self, buffer: Tensor) -> dist.Work:
        """Start a broadcast from rank 0."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.group.broadcast([buffer], options)

    def next_buffer(self, size: int, raise_if_stuck: Callable[[], None]) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def publish(self, buffer: Tensor, raise_if_stuck: Callable[[], None]) -> None:
        work = self.start(buffer)
        while not work.is_completed():
            raise_if_stuck()
            time.sleep(POLL)
        try:
            work.wait()
        except RuntimeError as error:  # gloo says so as soon as a peer closes its connection
            raise EngineDied(f"an engine left the weight transfer: {first_line(error)}") from error

    def receive(self, sizes: Iterable[int]) -> Iterator[Tensor]:
        def begin(size: int) -> tuple[Tensor, dist.Work]:
            buffer = torch.empty(size, dtype=torch.uint8)
            return buffer, self.start(buffer)

        incoming = map(begin, sizes)
        following = next(incoming, None)
        while following:
            buffer, work = following
            work.wait()
            following = next(incoming, None)  # travels while this one is loaded
            yield buffer

    def close(self) -> None:
        del self.group


class Memory:
    """Buffers in a piece of memory without a name, which the learner makes and every worker maps:
    nothing is left behind, whoever is killed.

    Learner and workers count buffers; what has come how far stands in the store.
    """

    def __init__(self, store, workers: int, largest: int, source: tuple[int, int] | None = None):
        """`largest`: bytes of the largest buffer.

        `source` (process, file descriptor) is None for the learner, and `self.source` of the
        learner for the workers. Raises SyncError where the learner's memory cannot be mapped.
        """
        self.store, self.workers, self.count = store, workers, 0
        self.slot_bytes = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE
        size = SLOTS * self.slot_bytes
        self.own_file: int | None = None  # the learner keeps it open for the workers
        if source is None:
            file = self.own_file = os.memfd_create(NAME)
            os.ftruncate(file, size)
            source = os.getpid(), file
        else:
            file = open_memory(*source)
        self.source = source
        self.memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        if self.own_file is None:
            os.close(file)

    def at(self, number: int, size: int) -> Tensor:
        start = number % SLOTS * self.slot_bytes
        return self.memory[start : start + size]

    def next_buffer(self, size: int, raise_if_stuck: Callable[[], None]) -> Tensor:
        """The next slot, once all workers have taken what is in it."""
        before = self.count - SLOTS
        if before >= 0:
            while self.store.add(f"taken {before}", 0) < self.workers:
                raise_if_stuck()
                time.sleep(POLL)
            self.store.delete_key(f"taken {before}")
            self.store.delete_key(f"ready {before}")
        return self.at(self.count, size)

    def publish(self, buffer: Tensor, raise_if_stuck: Callable[[], None]) -> None:
        self.store.set(f"ready {self.count}", "")
        self.count += 1

    def receive(self, sizes: Iterable[int]) -> Iterator[Tensor]:
        for size in sizes:
            self.store.wait([f"ready {self.count}"])
            yield self.at(self.count, size)
            self.store.add(f"taken {self.count}", 1)
            self.count += 1

    def close(self) -> None:
        if self.own_file is not None:
            os.close(self.own_file)
            self.own_file = None


def open_memory(process: int, descriptor: int) -> int:
    """The learner's memory as a file of this process."""
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        # on another machine the numbers may stand for anything
        if NAME not in os.readlink(path):
            raise FileNotFoundError(0, "it is another file here")
        return os.open(path, os.O_RDWR)
    except OSError as error:
        raise SyncError(
            f"the learner's shared memory cannot be opened ({error.strerror}): "
            "sync.transport=shm is for engines and learner on one machine, "
            "in one container; use sync.transport=gloo"
        ) from error
