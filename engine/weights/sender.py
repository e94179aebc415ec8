"""Weights from the learner into rollout engines, through vLLM's own weight-transfer interface.

    learner rank 0                                   engines 1 .. N (every tensor-parallel worker of
                                                     each)
    Sender -> vLLM trainer engine  == weights ====>  vLLM worker engine -> model.load_weights
           -> PoolClient           -- Ray calls -->  init / start / update / finish

`shm` and `gloo` are transports of our own, for CPUs (cpu_sender.py, channels.py, receiver.py).
`nccl` is vLLM's packed NCCL broadcast, `ipc` its CUDA-IPC handles for engines that share the
learner's GPUs; their worker sides are extended only to digest what arrives.

Both sides digest every tensor: the learner as it leaves, each worker as it arrives, before vLLM
splits, fuses and packs it. The other side is rollout/vllm/worker.py, or rollout/actor.py for a
backend of the user's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    WeightSource,
)

from tandem.engine.config.schema import SyncConfig
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.outcomes import Delivery
from tandem.engine.weights.background import Call, on_this_gpu
from tandem.engine.weights.buckets import largest
from tandem.engine.weights.client import PoolClient
from tandem.engine.weights.cpu_sender import CpuSender
from tandem.engine.weights.digest import digest
from tandem.engine.weights.wire import CpuTrainerInit, shapes


class DigestingSource(WeightSource):
    """A source that digests each tensor as it passes, on the rank that sends."""

    def __init__(self, source: WeightSource, active: bool):
        self.source, self.active = source, active
        self.digests: dict[str, str] = {}

    def metadata(self) -> list[ParamMeta]:
        return self.source.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digests = {}
        for name, tensor in self.source:
            if self.active:
                self.digests[name] = digest(tensor)
            yield name, tensor


class Sender:
    """A connected trainer engine.

    `send` is called on every learner rank, since gathering sharded weights is a collective.
    """

    def __init__(
        self,
        engine: TrainerWeightTransferEngine,
        client: PoolClient | None,
        source: DigestingSource,
    ):
        """`client`: rank 0's; the other ranks have none."""
        self.engine, self.client, self.source = engine, client, source
        self.on_cpu = isinstance(engine, CpuSender)

    def send(self, version: int) -> Delivery:
        """Send all weights to all engines and make them live as `version`.

        The report is rank 0's; other ranks return an empty one.

        Raises EngineDied or SyncError within sync.timeout. No engine serves after that: those that
        live were left in the middle of an update and count as dead
        (EnginePool.restart_dead restarts them). With ipc, and with nccl under ZeRO-3, an engine
        that dies in the middle ends a run of several ranks: the others wait in collectives of
        vLLM's that rank 0 has left. One that is dead before is found in time.
        """
        if not self.on_cpu:
            self.check_engines()
            # vLLM sends from streams of its own, which do not wait for the optimizer's last kernels
            torch.cuda.synchronize()
        if self.client is None:
            self.engine.send_weights()
            return Delivery({}, [], 0)
        self.client.version = version
        self.client.restart_clock()
        if self.on_cpu:
            self.engine.send_weights()
        else:
            on_this_gpu(self.engine.send_weights, self.client.deadline)
        size = sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in self.source.metadata())
        return Delivery(dict(self.source.digests), self.client.installed, size)

    def check_engines(self) -> None:
        """Raise EngineDied on every rank if an engine is dead, before any of them enters a
        collective.
        """
        error: list[EngineDied | SyncError | None] = [None]
        if self.client is not None:
            self.client.restart_clock()
            try:
                self.client.call_all("health")
            except (EngineDied, SyncError) as found:
                error = [found]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]

    def close(self) -> None:
        """Leave the transfer group. NCCL may wait for peers that are dead, so it is not waited
        for.
        """
        if self.client is None or self.on_cpu:
            self.engine.shutdown()
        else:
            Call(self.engine.shutdown)


def trainer_engine(
    transport: str,
    rank: int,
    handles: Sequence[Any],
    source: WeightSource,
    master_address: str,
    port: int,
    sync: SyncConfig,
) -> Sender:
    """Connect learner rank `rank` with the engines; called on every rank, rank 0 does the work.

    `port` is a free one on rank 0's host.

    To connect again (after a restart) call it again with another port. Raises EngineDied or
    SyncError within sync.timeout.
    """
    client = PoolClient(handles, sync.timeout) if rank == 0 else None
    digesting = DigestingSource(source, active=rank == 0)
    world_size = 1 + sum(client.ranks) if client else 0
    init = trainer_init(transport, rank, world_size, source, master_address, port, sync)

    def connect() -> TrainerWeightTransferEngine:
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=digesting)

    if client is None or transport in ("shm", "gloo"):
        engine = connect()
    else:
        engine = on_this_gpu(connect, client.deadline)
    return Sender(engine, client, digesting)


def trainer_init(
    transport: str,
    rank: int,
    world_size: int,
    source: WeightSource,
    address: str,
    port: int,
    sync: SyncConfig,
) -> TrainerInitInfo:
    """What vLLM makes the trainer engine of a transport from."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    size = sync.bucket_mib << 20
    if transport in ("shm", "gloo"):
        return CpuTrainerInit(transport, address, port, world_size, size, sync.timeout, rank=rank)
    if transport == "nccl":
        return NCCLTrainerInitInfo(
            address, port, world_size, packed=True, packed_buffer_size_bytes=size, rank=rank
        )
    # ipc: its one buffer must hold the largest tensor
    size = max(size, largest(shapes(source.metadata()), size))
    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=rank)
