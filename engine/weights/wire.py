"""What is agreed before weights are sent: buckets and the init and update messages of CPU engines."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

ALIGN = 16  # bytes; a view of a packed buffer must start where its dtype may start


class Stopwatch:
    """Seconds by phase: `lap(phase)` books the time since the lap before. Shown in the logs of
    learner and engine, one line per weight sync.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, phase: str | None = None) -> None:
        now = time.perf_counter()
        if phase is not None:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def show(self, side: str) -> None:
        print(
            f"weights {side}: "
            + ", ".join(f"{phase} {seconds:.4f}" for phase, seconds in self.seconds.items()),
            flush=True,
        )


# -- what both sides of the CPU transports must agree on


@dataclass
class CpuInitInfo(WeightTransferInitInfo):
    transport: str  # shm or gloo
    master_address: str
    master_port: int
    rank_offset: int  # of this engine's first worker; the learner is rank 0
    world_size: int
    bucket_bytes: int
    timeout: float  # seconds
    # shm: bytes of the largest buffer, and where the learner's memory is: process, file descriptor
    slot: int
    place: tuple[int, int] | None


@dataclass
class CpuUpdateInfo(WeightTransferUpdateInfo):
    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class CpuTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = "tandem_cpu"
    transport: str
    master_address: str
    master_port: int
    world_size: int
    bucket_bytes: int
    timeout: float


def buckets(meta: Sequence[ParamMeta], limit: int) -> Iterator[list[tuple[ParamMeta, int, int]]]:
    """Consecutive parameters packed into buffers of at most `limit` bytes (one larger parameter has
    a buffer to itself): (meta, offset, bytes).
    """
    bucket, end = [], 0
    for m in meta:
        size = torch.Size(m.shape).numel() * m.dtype.itemsize
        if bucket and end + size > limit:
            yield bucket
            bucket, end = [], 0
        bucket.append((m, end, size))
        end += -(-size // ALIGN) * ALIGN
    if bucket:
        yield bucket


def size_of(bucket: list[tuple[ParamMeta, int, int]]) -> int:
    _, offset, size = bucket[-1]
    return max(1, offset + size)
