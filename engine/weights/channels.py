"""Channels that take weights to engines on CPUs: shared memory on one machine, gloo between
machines. vLLM has neither.

    learner rank 0                                            every worker of every engine
    room(size) -> buffer, filled by the caller                for buffer in receive(sizes): ...
    publish(buffer)

A buffer that was received is good until the next one is asked for. Both sides wait no longer than
their timeout; the learner's side meanwhile asks `patience()`, which raises when it is of no use to
wait any more.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

import torch

from tandem.engine.core.errors import EngineDied, SyncError

POLL = 0.0003  # seconds
NAME = "tandem_weights"
# buffers in shared memory: the learner fills one while the engines load the other
SLOTS = 2


def open_store(address: str, port: int, world_size: int, timeout: float, master: bool):
    """The small key-value server through which learner (which runs it) and workers find each other."""
    import torch.distributed as dist

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
        import torch.distributed as dist

        self.group = dist.ProcessGroupGloo(
            dist.PrefixStore("tandem_weights", store), rank, world_size, timedelta(seconds=timeout)
        )

    def start(self, buffer: torch.Tensor):
        """Start a broadcast from rank 0; returns the work handle."""
        import torch.distributed as dist

        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return self.group.broadcast([buffer], options)

    def room(self, size: int, patience: Callable[[], None]) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def publish(self, buffer: torch.Tensor, patience: Callable[[], None]) -> None:
        work = self.start(buffer)
        while not work.is_completed():
            patience()
            time.sleep(POLL)
        try:
            work.wait()
        except RuntimeError as error:  # gloo says so as soon as a peer closes its connection
            raise EngineDied(
                f"an engine left the weight transfer: {str(error).splitlines()[0]}"
            ) from error

    def receive(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        def begin(size):
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
        self.group = None


class Memory:
    """Buffers in a piece of memory without a name, which the learner makes and every worker maps:
    nothing is left behind, whoever is killed.

    Learner and workers count buffers; what has come how far stands in the store. Raises SyncError
    where the learner's memory cannot be mapped.
    """

    def __init__(self, store, workers: int, slot: int, place: tuple[int, int] | None = None):
        """`slot`: bytes of the largest buffer.

        `place` (process, file descriptor) is None for the learner and `self.place` of the learner
        for the workers.
        """
        self.store, self.workers, self.slot, self.count = (
            store,
            workers,
            -(-slot // mmap.PAGESIZE) * mmap.PAGESIZE,
            0,
        )
        if place is None:
            file = os.memfd_create(NAME)
            os.ftruncate(file, SLOTS * self.slot)
            self.file, self.place = file, (os.getpid(), file)
        else:
            self.file = None
            path = "/proc/{}/fd/{}".format(*place)
            try:
                # on another machine the numbers may stand for anything
                if NAME not in os.readlink(path):
                    raise FileNotFoundError(0, "it is another file here")
                file = os.open(path, os.O_RDWR)
            except OSError as error:
                raise SyncError(
                    f"the learner's shared memory cannot be opened ({error.strerror}): "
                    "sync.transport=shm is for engines and learner on one machine, "
                    "in one container; use sync.transport=gloo"
                ) from error
        self.memory = torch.frombuffer(mmap.mmap(file, SLOTS * self.slot), dtype=torch.uint8)
        if self.file is None:
            os.close(file)

    def at(self, number: int, size: int) -> torch.Tensor:
        start = number % SLOTS * self.slot
        return self.memory[start : start + size]

    def room(self, size: int, patience: Callable[[], None]) -> torch.Tensor:
        before = f"taken {self.count - SLOTS}"
        if self.count >= SLOTS:
            while self.store.add(before, 0) < self.workers:
                patience()
                time.sleep(POLL)
            self.store.delete_key(before)
            self.store.delete_key(f"ready {self.count - SLOTS}")
        return self.at(self.count, size)

    def publish(self, buffer: torch.Tensor, patience: Callable[[], None]) -> None:
        self.store.set(f"ready {self.count}", "")
        self.count += 1

    def receive(self, sizes: Iterable[int]) -> Iterator[torch.Tensor]:
        for size in sizes:
            self.store.wait([f"ready {self.count}"])
            yield self.at(self.count, size)
            self.store.add(f"taken {self.count}", 1)
            self.count += 1

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None
