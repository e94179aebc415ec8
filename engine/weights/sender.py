"""Weights from the learner into vLLM engines, through vLLM's own weight-transfer interface.

    learner rank 0                                   engines 1 .. N (every tensor-parallel worker of
                                                     each)
    Sender -> vLLM trainer engine  == weights ====>  vLLM worker engine -> model.load_weights
           -> PoolClient           -- Ray calls -->  init / start / update / finish

`shm` and `gloo` are transports of our own, for CPUs (channels.py). `nccl` is vLLM's packed NCCL
broadcast, `ipc` its CUDA-IPC handles for engines that share the learner's GPUs; their worker sides
are extended only to digest what arrives. vLLM's own Ray client gives every engine the same rank,
which is wrong for more than one engine: PoolClient does not.

Both sides digest every tensor: the learner as it leaves, each worker as it arrives, before vLLM
splits, fuses and packs it. This file is the learner's side and what both sides share;
vllm_worker.py is the other side.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
)

from tandem.engine.config.schema import SyncConfig
from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.weights.channels import Gloo, Memory, open_store
from tandem.engine.weights.digest import digest
from tandem.engine.weights.wire import CpuTrainerInit, CpuUpdateInfo, Stopwatch, buckets, size_of

# -- learner side


class PoolClient:
    """vLLM's weight-sync control plane over Ray actor handles: each call goes to all engines at
    once and ends by `deadline`.

    Raises EngineDied if an engine is gone or does not answer in time, SyncError if it answers with
    an error. `installed` is what each engine says after the last update.
    """

    def __init__(self, handles: Sequence[Any], timeout: float):
        self.handles, self.timeout = list(handles), timeout
        self.version, self.installed = -1, []
        self.restart_clock()
        self.ranks = self.call("transfer_ranks", [()] * len(self.handles))

    def restart_clock(self) -> None:
        self.deadline = time.monotonic() + self.timeout

    def call(self, method: str, arguments: Sequence[tuple]) -> list[Any]:
        """method(*arguments[i]) on engine i; the first failure is raised at once, without waiting
        for the others.
        """
        import ray

        refs = [
            getattr(handle, method).remote(*args)
            for handle, args in zip(self.handles, arguments, strict=True)
        ]
        waiting, answers = refs, {}
        while waiting:
            done, waiting = ray.wait(
                waiting, timeout=max(0.0, self.deadline - time.monotonic()), fetch_local=False
            )
            if not done:
                raise EngineDied(
                    f"engine(s) {[refs.index(r) for r in waiting]} did not answer {method} "
                    f"within sync.timeout={self.timeout:g} s"
                )
            for ref in done:
                try:
                    answers[ref] = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    raise EngineDied(
                        f"engine {refs.index(ref)} died in {method}: {str(error).splitlines()[0]}"
                    ) from error
                except ray.exceptions.RayTaskError as error:
                    cause = (
                        error.cause if isinstance(error.cause, (EngineDied, SyncError)) else None
                    )
                    raise type(cause or SyncError(""))(
                        f"engine {refs.index(ref)} failed in {method}: {cause or error}"
                    ) from error
        return [answers[ref] for ref in refs]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self.ranks]
        if "rank_offset" in init_info:  # ipc has no ranks
            for i, info in enumerate(infos):
                info["rank_offset"] += sum(self.ranks[:i])
        self.call("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        # an engine that is dead is found before the living ones have begun an update they could not
        # finish
        self.call("health", [()] * len(self.handles))
        self.call("start_weight_update", [()] * len(self.handles))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call("update_weights", [(update_info,)] * len(self.handles))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's trainer engines pass no version; it was set by Sender.send."""
        self.installed = self.call("finish_weight_update", [(self.version,)] * len(self.handles))


class DigestingSource(WeightSource):
    """A source that digests each tensor as it passes, on the rank that sends."""

    def __init__(self, source: WeightSource, active: bool):
        self.source, self.active, self.digests = source, active, {}

    def metadata(self) -> list[ParamMeta]:
        return self.source.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.digests = {}
        for name, tensor in self.source:
            if self.active:
                self.digests[name] = digest(tensor)
            yield name, tensor


class CpuSender(TrainerWeightTransferEngine[CpuTrainerInit]):
    """Sends the learner's weights through a channel.

    Only rank 0 has one; the other ranks iterate the source, which gathers sharded weights.
    """

    init_info_cls = CpuTrainerInit

    @classmethod
    def trainer_init(
        cls,
        init_info: CpuTrainerInit,
        *,
        client: PoolClient | None,
        source: WeightSource | None = None,
    ) -> CpuSender:
        engine = cls(client=client, source=source, is_sender=init_info.is_sender)
        engine.bucket_bytes, engine.channel = init_info.bucket_bytes, None
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
        slot, place = (
            max(size_of(bucket) for bucket in buckets(self.source.metadata(), self.bucket_bytes)),
            None,
        )
        if init.transport == "shm":
            self.channel = Memory(store, init.world_size - 1, slot)
            place = self.channel.place
        fields = {key: value for key, value in asdict(init).items() if key != "rank"}
        workers = Call(
            lambda: self.client.init_weight_transfer_engine(
                {**fields, "rank_offset": 1, "slot": slot, "place": place}
            )
        )
        if init.transport == "gloo":
            group, patience = (
                Call(lambda: Gloo(store, 0, init.world_size, init.timeout)),
                self.patience(workers, "engines did not join the transfer group"),
            )
            while not group.done():
                patience()  # an engine that failed will never join: do not wait for it
                time.sleep(0.002)
        # before the group's: an engine that could not join says more about it than the group does
        workers.result(self.client.deadline)
        if init.transport == "gloo":
            self.channel = group.result(self.client.deadline)

    def patience(self, workers: Call, failure: str) -> Callable[[], None]:
        def patience():
            workers.check()
            if time.monotonic() > self.client.deadline:
                raise EngineDied(f"{failure} within sync.timeout={self.client.timeout:g} s")

        return patience

    def send_weights(self) -> None:
        meta, tensors = self.source.metadata(), iter(self.source)
        try:
            if self.is_sender:
                self.transmit(meta, tensors)
        finally:
            # also after a failure: the other ranks are in the same collectives and must not be left
            # there
            deque(tensors, maxlen=0)

    def transmit(self, meta: list[ParamMeta], tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        watch = Stopwatch()
        self.client.start_weight_update()
        watch.lap("start")
        update = CpuUpdateInfo(
            [m.name for m in meta],
            [str(m.dtype).removeprefix("torch.") for m in meta],
            [list(m.shape) for m in meta],
        )
        workers = Call(lambda: self.client.update_weights(asdict(update)))
        patience = self.patience(workers, "weights were not taken")
        for bucket in buckets(meta, self.bucket_bytes):
            buffer = self.channel.room(size_of(bucket), patience)
            watch.lap("transfer")
            for expected, start, size in bucket:
                name, tensor = next(tensors)
                watch.lap("gather and digest")
                if (name, tensor.dtype, tuple(tensor.shape)) != (
                    expected.name,
                    expected.dtype,
                    tuple(expected.shape),
                ):
                    raise SyncError(
                        f"the weight source announced {expected} and gave {name} "
                        f"{tensor.dtype} {tuple(tensor.shape)}"
                    )
                buffer[start : start + size].copy_(
                    tensor.detach().contiguous().view(-1).view(torch.uint8)
                )
                watch.lap("copy")
            self.channel.publish(buffer, patience)
            watch.lap("transfer")
        workers.result(self.client.deadline)
        watch.lap("wait for engines")
        self.client.finish_weight_update()
        watch.lap("finish")
        watch.show("sent")

    def shutdown(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None


class Call:
    """A function running in a daemon thread: unlike an executor's, such a thread cannot keep the
    process from exiting when its peer has died.
    """

    def __init__(self, function: Callable[[], Any]):
        self.value, self.error = None, None
        self.thread = threading.Thread(target=self.run, args=(function,), daemon=True)
        self.thread.start()

    def run(self, function) -> None:
        try:
            self.value = function()
        except BaseException as error:  # handed to the caller by check() or result()
            self.error = error

    def done(self) -> bool:
        return not self.thread.is_alive()

    def check(self) -> None:
        """Raise what the function raised, if it has ended that way."""
        if self.error is not None:
            raise self.error

    def result(self, deadline: float) -> Any:
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            raise EngineDied("a weight transfer did not end within sync.timeout")
        self.check()
        return self.value


def on_this_gpu(function: Callable[[], Any], deadline: float) -> Any:
    """Run a function that may wait in NCCL, which cannot be interrupted: when the deadline has
    passed it is left behind in its thread.
    """
    device = torch.cuda.current_device()
    return Call(lambda: (torch.cuda.set_device(device), function())[1]).result(deadline)


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
        self.engine, self.client, self.source = engine, client, source

    def send(self, version: int) -> Delivery:
        """Send all weights to all engines and make them live as `version`.

        The report is rank 0's; other ranks return an empty one.

        Raises EngineDied or SyncError within sync.timeout. No engine serves after that: those that
        live were left in the middle of an update and count as dead (EnginePool.recover restarts
        them). With ipc, and with nccl under ZeRO-3, an engine that dies in the middle ends a run of
        several ranks: the others wait in collectives of vLLM's that rank 0 has left. One that is
        dead before is found in time.
        """
        from tandem.engine.core.types import Delivery

        if not isinstance(self.engine, CpuSender):
            self.check_engines()
            # vLLM sends from streams of its own, which do not wait for the optimizer's last kernels
            torch.cuda.synchronize()
        if self.client is None:
            self.engine.send_weights()
            return Delivery({}, [], 0)
        self.client.version = version
        self.client.restart_clock()
        if isinstance(self.engine, CpuSender):
            self.engine.send_weights()
        else:
            on_this_gpu(self.engine.send_weights, self.client.deadline)
        size = sum(torch.Size(m.shape).numel() * m.dtype.itemsize for m in self.source.metadata())
        return Delivery(dict(self.source.digests), self.client.installed, size)

    def check_engines(self) -> None:
        """Raise EngineDied on every rank if an engine is dead, before any of them enters a
        collective.
        """
        error = [None]
        if self.client is not None:
            self.client.restart_clock()
            try:
                self.client.call("health", [()] * len(self.client.handles))
            except (EngineDied, SyncError) as found:
                error = [found]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]

    def close(self) -> None:
        """Leave the transfer group.

        NCCL may wait for peers that are dead, so nobody waits for NCCL.
        """
        if self.client is None or isinstance(self.engine, CpuSender):
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
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    client = PoolClient(handles, sync.timeout) if rank == 0 else None
    world_size = 1 + sum(client.ranks) if client else 0
    source, size = DigestingSource(source, active=rank == 0), sync.bucket_mib << 20
    if transport in ("shm", "gloo"):
        init = CpuTrainerInit(
            transport, master_address, port, world_size, size, sync.timeout, rank=rank
        )
    elif transport == "nccl":
        init = NCCLTrainerInitInfo(
            master_address, port, world_size, packed=True, packed_buffer_size_bytes=size, rank=rank
        )
    else:  # its one buffer must hold the largest tensor
        largest = max(size_of(bucket) for bucket in buckets(source.metadata(), size))
        init = IPCTrainerInitInfo(
            packed=True, packed_buffer_size_bytes=max(size, largest), rank=rank
        )

    def connect():
        return WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)

    return Sender(
        connect()
        if transport in ("shm", "gloo") or client is None
        else on_this_gpu(connect, client.deadline),
        client,
        source,
    )


if TYPE_CHECKING:
    from tandem.engine.core.types import Delivery


WeightTransferTrainerFactory.register_engine("tandem_cpu", CpuSender)
