"""The learner's end of the CPU transports: vLLM's trainer engine over a channel."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightSource

from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.weights.background import Call
from tandem.engine.weights.buckets import Piece, Shape, buckets, largest, size_of
from tandem.engine.weights.channels import Gloo, Memory, open_store
from tandem.engine.weights.client import PoolClient
from tandem.engine.weights.stopwatch import Stopwatch
from tandem.engine.weights.wire import CpuTrainerInit, CpuUpdateInfo, shapes


class CpuSender(TrainerWeightTransferEngine[CpuTrainerInit]):
    """Sends the learner's weights through a channel.

    Only rank 0 has one; the other ranks iterate the source, which gathers sharded weights.
    """

    init_info_cls = CpuTrainerInit
    client: PoolClient  # rank 0 only
    source: WeightSource
    bucket_bytes: int
    channel: Memory | Gloo | None = None

    @classmethod
    def trainer_init(
        cls,
        init_info: CpuTrainerInit,
        *,
        client: PoolClient | None,
        source: WeightSource | None = None,
    ) -> CpuSender:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.bucket_bytes = init_info.bucket_bytes
        if engine.is_sender:
            try:
                engine.connect(init_info)
            except BaseException:
                engine.shutdown()
                raise
        return engine

    def connect(self, init: CpuTrainerInit) -> None:
        store = open_store(
            init.master_address, init.master_port, init.world_size, init.timeout, master=True
        )
        info = asdict(init)
        del info["rank"]
        info["rank_offset"] = 1
        info["largest"] = largest(shapes(self.source.metadata()), self.bucket_bytes)
        info["source"] = None
        if init.transport == "shm":
            memory = Memory(store, init.world_size - 1, info["largest"])
            self.channel, info["source"] = memory, memory.source
        engines = Call(lambda: self.client.init_weight_transfer_engine(info))
        if init.transport == "gloo":
            self.channel = self.join_group(store, init, engines)
        engines.result(self.client.deadline)

    def join_group(self, store, init: CpuTrainerInit, engines: Call) -> Gloo:
        """The group of the learner and all workers, once they have joined it.

        Where `engines` fail to, their error is raised: they will never join, and they say more
        about it than the group does.
        """
        group = Call(lambda: Gloo(store, 0, init.world_size, init.timeout))
        raise_if_stuck = self.watch(engines, "engines did not join the transfer group")
        while not group.done():
            raise_if_stuck()
            time.sleep(0.002)
        engines.result(self.client.deadline)
        return group.result(self.client.deadline)

    def watch(self, engines: Call, failure: str) -> Callable[[], None]:
        """A function that raises when waiting for the engines cannot succeed: they failed, or
        sync.timeout has passed.
        """

        def raise_if_stuck():
            engines.check()
            if time.monotonic() > self.client.deadline:
                raise EngineDied(f"{failure} within sync.timeout={self.client.timeout:g} s")

        return raise_if_stuck

    def send_weights(self) -> None:
        parameters, tensors = shapes(self.source.metadata()), iter(self.source)
        try:
            if self.is_sender:
                self.transmit(parameters, tensors)
        finally:
            # also after a failure: the other ranks are in the same collectives and must not be left
            # there
            deque(tensors, maxlen=0)

    def transmit(self, parameters: list[Shape], tensors: Iterator[tuple[str, Tensor]]) -> None:
        assert self.channel is not None
        watch = Stopwatch()
        self.client.start_weight_update()
        watch.lap("start")
        update = CpuUpdateInfo(
            [name for name, _, _ in parameters],
            [str(dtype).removeprefix("torch.") for _, dtype, _ in parameters],
            [list(shape) for _, _, shape in parameters],
        )
        engines = Call(lambda: self.client.update_weights(asdict(update)))
        raise_if_stuck = self.watch(engines, "weights were not taken")
        for bucket in buckets(parameters, self.bucket_bytes):
            buffer = self.channel.next_buffer(size_of(bucket), raise_if_stuck)
            watch.lap("transfer")
            for piece in bucket:
                name, tensor = next(tensors)
                watch.lap("gather and digest")
                check_announced(piece, name, tensor)
                raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
                buffer[piece.start : piece.end].copy_(raw)
                watch.lap("copy")
            self.channel.publish(buffer, raise_if_stuck)
            watch.lap("transfer")
        engines.result(self.client.deadline)
        watch.lap("wait for engines")
        self.client.finish_weight_update()
        watch.lap("finish")
        watch.show("sent")

    def shutdown(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


def check_announced(piece: Piece, name: str, tensor: Tensor) -> None:
    """Raise SyncError if the source gives another parameter than its metadata said."""
    if (name, tensor.dtype, tuple(tensor.shape)) != (piece.name, piece.dtype, piece.shape):
        raise SyncError(
            f"the weight source announced {piece.name} {piece.dtype} {piece.shape} and gave "
            f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        )


WeightTransferTrainerFactory.register_engine("tandem_cpu", CpuSender)
