"""The messages of the CPU transports, as vLLM's weight-transfer interface carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from tandem.engine.weights.buckets import Shape
from tandem.engine.weights.receiver import ChannelInfo, Parameters


@dataclass
class CpuInitInfo(ChannelInfo, WeightTransferInitInfo):
    pass


@dataclass
class CpuUpdateInfo(Parameters, WeightTransferUpdateInfo):
    pass


@dataclass
class CpuTrainerInit(TrainerInitInfo):
    backend: ClassVar[str] = "tandem_cpu"
    transport: str
    master_address: str
    master_port: int
    world_size: int
    bucket_bytes: int
    timeout: float


def shapes(metadata: Sequence[ParamMeta]) -> list[Shape]:
    return [(m.name, m.dtype, tuple(m.shape)) for m in metadata]
