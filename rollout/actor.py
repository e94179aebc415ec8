"""The Ray actor that holds one rollout engine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core.errors import SyncError
from tandem.engine.core.loading import UserCode
from tandem.engine.core.types import GenRequest, Installed, Trajectory


class EngineActor:
    """One engine in a Ray actor; the methods are those of rollout.backend.Backend, and a few for
    the pool.
    """

    def __init__(
        self, index: int, config: Config, model_path: str, run_dir: str, stale: bool, code: UserCode
    ):
        from tandem.engine.core.loading import install
        from tandem.engine.core.process import pin_cores, redirect_output

        install(code)
        if config.cluster.pin_cores:
            pin_cores(config.cluster.threads, index)
        # before vLLM is imported, so that nothing of it reaches the user's terminal
        redirect_output(log_path(run_dir, index))
        self.index, self.config, self.model_path, self.stale = index, config, model_path, stale
        self.backend = None

    async def start(self) -> dict[str, float]:
        """Returns seconds spent by phase."""
        from tandem.rollout.vllm.backend import VllmBackend

        self.backend = await VllmBackend.start(
            self.model_path, self.config, self.config.run.seed + self.index
        )
        print(
            "engine up: "
            + ", ".join(
                f"{phase} {seconds:.1f}" for phase, seconds in self.backend.start_seconds.items()
            ),
            flush=True,
        )
        return self.backend.start_seconds

    async def generate(self, request: GenRequest) -> tuple[Trajectory, ...]:
        if self.stale:
            raise SyncError(
                f"engine {self.index} was restarted and still has the weights of "
                f"{self.model_path}; sync weights before it serves"
            )
        return await self.backend.generate(request)

    async def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        return await self.backend.logprobs(tokens)

    async def abort(self, request: GenRequest) -> None:
        await self.backend.abort(request)

    async def sleep(self) -> None:
        await self.backend.sleep()

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        await self.backend.init_weight_transfer_engine(init_info)

    async def start_weight_update(self) -> None:
        await self.backend.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self.backend.update_weights(update_info)

    async def finish_weight_update(self, version: int) -> Installed:
        installed = await self.backend.finish_weight_update(version)
        self.stale = False
        return installed

    async def health(self) -> None:
        await self.backend.health()

    async def close(self) -> None:
        if self.backend is not None:
            await self.backend.close()

    async def transfer_ranks(self) -> int:
        """How many ranks of the transfer group this engine takes."""
        return self.config.cluster.tensor_parallel

    async def updating(self) -> bool:
        """Whether a weight update was begun and not finished."""
        return self.backend.updating

    async def cache_counts(self) -> tuple[int, int]:
        """(prompt tokens, those of them that the prefix cache had), since the start."""
        return self.backend.prompt_tokens, self.backend.cached_tokens

    async def process_ids(self) -> list[int]:
        """The actor's process and vLLM's."""
        import multiprocessing

        return [os.getpid(), *(p.pid for p in multiprocessing.active_children())]


def log_path(run_dir: str | Path, index: int) -> Path:
    return Path(run_dir) / "logs" / f"engine_{index}.log"
