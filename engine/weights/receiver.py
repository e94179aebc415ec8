"""An engine's end of the CPU transports.

It knows nothing of vLLM: a backend of the user's own is fed by it, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.weights.buckets import Shape, buckets, size_of
from tandem.engine.weights.channels import Gloo, Memory, open_store


@dataclass
class ChannelInfo:
    """What an engine must know to join; the learner sends it."""

    transport: str  # shm or gloo
    master_address: str
    master_port: int
    rank_offset: int  # of this engine's first worker; the learner is rank 0
    world_size: int
    bucket_bytes: int
    timeout: float  # seconds
    largest: int  # bytes of the largest buffer
    # shm: where the learner's memory is: process, file descriptor
    source: tuple[int, int] | None


@dataclass
class Parameters:
    """What an update brings, in this order."""

    names: list[str]
    dtype_names: list[str]  # without `torch.`
    shapes: list[list[int]]

    def __iter__(self) -> Iterator[Shape]:
        for name, dtype, shape in zip(self.names, self.dtype_names, self.shapes, strict=True):
            yield name, getattr(torch, dtype), tuple(shape)


class Receiver:
    """Takes the learner's weights from a channel, in one process."""

    def __init__(self, info: ChannelInfo, worker: int = 0):
        """Join as `worker` of this engine; with gloo this waits until all have joined.

        Raises SyncError where the learner's memory cannot be mapped.
        """
        self.bucket_bytes = info.bucket_bytes
        store = open_store(
            info.master_address, info.master_port, info.world_size, info.timeout, master=False
        )
        self.channel: Memory | Gloo
        if info.transport == "gloo":
            self.channel = Gloo(store, info.rank_offset + worker, info.world_size, info.timeout)
        else:
            assert info.source is not None
            process, descriptor = info.source
            self.channel = Memory(store, info.world_size - 1, info.largest, (process, descriptor))

    def receive(self, parameters: Parameters) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, tensor) of the parameters, a buffer at a time; the tensors are views of it and
        good until the next is asked for.
        """
        plan = list(buckets(parameters, self.bucket_bytes))
        # the channel first: it is told that the last buffer is done with, too
        for buffer, bucket in zip(self.channel.receive(map(size_of, plan)), plan, strict=True):
            yield [(piece.name, piece.view(buffer)) for piece in bucket]

    def close(self) -> None:
        self.channel.close()
