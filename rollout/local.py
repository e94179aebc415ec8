"""The rollout pool of mode=inline: one backend in this process, no threads, so that `breakpoint()`
works and runs are reproducible.

Requests wait until a result is asked for; then all that wait are generated together. They are also
generated before weights change, so a request is always sampled with the weights that were live when
it was submitted, as on a cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.types import GenRequest, Trajectory
from tandem.rollout.backends.hf import HFBackend
from tandem.rollout.backends.replay import ReplayBackend


class LocalPool:
    """Same surface as `rollout.pool.EnginePool`, with `backends` instead of Ray handles."""

    def __init__(self, backend: HFBackend | ReplayBackend):
        self.backend = backend
        self.waiting: list[tuple[GenRequest, LazyFuture]] = []
        backend.before_update = self.generate

    @classmethod
    def start(cls, config: Config, model_path: str, run_dir: str | Path) -> LocalPool:
        """Load the model or the record. Raises ConfigError. Nothing is written to `run_dir`."""
        kind = ReplayBackend if config.rollout.backend == "replay" else HFBackend
        return cls(kind(model_path, config, config.run.seed))

    handles = ()

    @property
    def backends(self) -> list[HFBackend | ReplayBackend]:
        return [self.backend]

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        """A future that computes when its result or exception is asked for; it must be asked in the
        thread that submits.
        """
        future = LazyFuture(self)
        self.waiting.append((request, future))
        return future

    def generate(self) -> None:
        """Serve everything that waits, as one batch. An error belongs to all of its requests."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return
        try:
            with stop.computing():
                answers: Sequence = self.backend.generate_all([request for request, _ in waiting])
        except Exception as error:
            for _, future in waiting:
                future.set_exception(error)
            return
        for (_, future), trajectories in zip(waiting, answers, strict=True):
            future.set_result(trajectories)

    def abort(self, request: GenRequest) -> None:
        """Requests end in the call that computes them."""

    def logprobs(self, tokens: np.ndarray) -> dict[int, np.ndarray]:
        """There is no engine elsewhere."""
        return {}

    def sleep(self) -> None:
        """There is no GPU memory to give away."""

    def recover(self) -> int:
        """Nothing can die apart from this process."""
        return 0

    def stats(self) -> dict[str, float]:
        """Sums since the start."""
        return {
            "busy_seconds": self.backend.busy_seconds,
            "generated_tokens": float(self.backend.generated_tokens),
            "engines": 1.0,
        }

    def close(self) -> None:
        for _, future in self.waiting:
            future.cancel()
        self.waiting = []


class LazyFuture(Future):
    """Generates what waits in its pool when it is asked."""

    def __init__(self, pool: LocalPool):
        super().__init__()
        self.pool = pool

    def result(self, timeout: float | None = None):
        if not self.done():
            self.pool.generate()
        return super().result(timeout)

    def exception(self, timeout: float | None = None):
        if not self.done():
            self.pool.generate()
        return super().exception(timeout)
