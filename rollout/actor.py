"""The Ray actor that holds one rollout engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import SyncError
from tandem.engine.core.loading import UserCode
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Trajectory
from tandem.engine.weights.receiver import ChannelInfo, Parameters, Receiver
from tandem.rollout.backend import Backend, CacheCounts, backend_class
from tandem.rollout.trajectories import checked_answer, checked_installed


class EngineActor:
    """One engine in a Ray actor; the methods are those of rollout.backend.Backend, and a few for
    the pool. `start` comes first.
    """

    backend: Backend

    def __init__(
        self,
        index: int,
        config: Config,
        model_path: str,
        run_dir: str,
        stale: bool,
        code: UserCode,
    ):
        """`stale`: the run has newer weights than the model folder, so that none of its tokens may
        be sampled before an update.
        """
        from tandem.engine.core.loading import install
        from tandem.engine.core.process import pin_cores, redirect_output

        install(code)
        if config.cluster.pin_cores:
            pin_cores(config.cluster.threads, index)
        # before the engine's libraries are imported, so that nothing of theirs reaches the terminal
        redirect_output(log_path(run_dir, index))
        self.index = index
        self.config = config
        self.model_path = model_path
        self.stale = stale
        self.in_update = False
        # takes the weights for a backend that is given named tensors
        self.receiver: Receiver | None = None

    async def start(self) -> None:
        cls = backend_class(self.config)
        seed = self.config.run.seed + self.index
        options = self.config.rollout.backend_options
        self.backend = await cls.start(self.model_path, self.config, seed, **options)

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        if self.stale:
            raise SyncError(
                f"engine {self.index} was restarted and still has the weights of "
                f"{self.model_path}; sync weights before it serves"
            )
        answer = await self.backend.generate(request)
        return checked_answer(request, answer)

    async def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return await self.backend.logprobs(tokens)

    async def abort(self, request: GenRequest) -> None:
        await self.backend.abort(request)

    async def sleep(self) -> None:
        await self.backend.sleep()

    async def transfer_ranks(self) -> int:
        return self.backend.transfer_ranks

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        if self.backend.joins_transfer:
            await self.backend.init_weight_transfer_engine(init_info)
            return
        if self.receiver is not None:
            self.receiver.close()
        info = ChannelInfo(**init_info)
        # in a thread: with gloo it waits for the other engines
        self.receiver = await asyncio.to_thread(Receiver, info)

    async def start_weight_update(self) -> None:
        self.in_update = True
        await self.backend.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        if self.receiver is None:
            await self.backend.update_weights(update_info)
            return
        parameters = Parameters(**update_info)
        incoming = self.receiver.receive(parameters)
        while named := await asyncio.to_thread(next, incoming, None):
            await self.backend.update_weights({"named": named})

    async def finish_weight_update(self, version: int) -> Installed:
        answer = await self.backend.finish_weight_update(version)
        installed = checked_installed(answer)
        self.stale = False
        self.in_update = False
        return installed

    async def updating(self) -> bool:
        """Whether a weight update was begun and not finished."""
        return self.in_update

    async def health(self) -> None:
        await self.backend.health()

    async def cache_counts(self) -> CacheCounts | None:
        return await self.backend.cache_counts()

    async def close(self) -> None:
        if hasattr(self, "backend"):
            await self.backend.close()

    async def process_ids(self) -> list[int]:
        """The actor's process and its children, such as vLLM's."""
        import multiprocessing

        pids = [os.getpid()]
        for process in multiprocessing.active_children():
            if process.pid is not None:
                pids.append(process.pid)
        return pids


def log_path(run_dir: str | Path, index: int) -> Path:
    return Path(run_dir) / "logs" / f"engine_{index}.log"


def end_of(path: Path) -> str:
    """The last lines of a log."""
    if not path.exists():
        return "(on another machine)"
    lines = path.read_text(errors="replace").splitlines()
    return "\n  ".join(lines[-15:])
