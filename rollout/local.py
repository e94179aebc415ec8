"""The rollout pool of mode=inline: one backend in this process, no threads, so that `breakpoint()`
works and runs are reproducible.

Requests wait until a result is asked for; then all that wait are generated together. They are also
generated before weights change, so a request is always sampled with the weights that were live when
it was submitted, as on a cluster.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from torch import Tensor

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied, RolloutPoolExhausted
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Trajectory
from tandem.rollout.backend import Backend, backend_class
from tandem.rollout.trajectories import checked_answer, checked_installed, sampled


class LocalPool:
    """Same surface as `rollout.pool.EnginePool`, with `install` instead of Ray handles."""

    can_score_logprobs = False  # its backend is not compared with itself around the first update
    handles = ()

    def __init__(self, backend: Backend, loop: asyncio.AbstractEventLoop):
        """`loop`: on which the backend was started; it runs only while something is asked."""
        self.backend = backend
        self.loop = loop
        self.waiting: list[tuple[GenRequest, OnDemand]] = []
        self.busy_seconds = 0.0
        self.generated_tokens = 0
        self.died = False

    @classmethod
    def start(cls, config: Config, model_path: str) -> LocalPool:
        """Load the model or the record. Raises ConfigError."""
        loop = asyncio.new_event_loop()
        options = config.rollout.backend_options
        starting = backend_class(config).start(model_path, config, config.run.seed, **options)
        backend = loop.run_until_complete(starting)
        return cls(backend, loop)

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        """A future that computes when its result or exception is asked for; it must be asked in the
        thread that submits.
        """
        future = OnDemand(self)
        self.waiting.append((request, future))
        return future

    def generate(self) -> None:
        """Serve everything that waits, as one batch. An error belongs to all of its requests."""
        waiting = self.waiting
        self.waiting = []
        if not waiting:
            return
        requests = [request for request, _ in waiting]
        began = time.perf_counter()
        try:
            with stop.computing():
                answers = self.loop.run_until_complete(self.backend.generate_all(requests))
            if not self.backend.recorded:  # a record has the rows that were trained on
                pairs = zip(requests, answers, strict=True)
                answers = [checked_answer(request, answer) for request, answer in pairs]
        except Exception as error:
            self.died = self.died or isinstance(error, EngineDied)
            for _, future in waiting:
                future.set_exception(error)
            return
        if not self.backend.recorded:
            self.busy_seconds += time.perf_counter() - began
            self.generated_tokens += sum(map(sampled, answers))
        for (_, future), trajectories in zip(waiting, answers, strict=True):
            future.set_result(tuple(trajectories))

    def install(self, named: Sequence[tuple[str, Tensor]], version: int) -> list[Installed]:
        """Give the backend all parameters as `version`, after what waits was generated with those
        it has.
        """
        self.generate()

        async def update() -> Installed:
            await self.backend.start_weight_update()
            await self.backend.update_weights({"named": named})
            answer = await self.backend.finish_weight_update(version)
            return checked_installed(answer)

        installed = self.loop.run_until_complete(update())
        return [installed]

    def abort(self, request: GenRequest) -> None:
        """Requests end in the call that computes them."""

    def logprobs(self, tokens: np.ndarray) -> dict[int, np.ndarray]:
        """There is no engine elsewhere."""
        return {}

    def sleep(self) -> None:
        """There is no GPU memory to give away."""

    def restart_dead(self) -> int:
        """Raises RolloutPoolExhausted if the backend said that it died: there is no other process
        to start it in.
        """
        if self.died:
            raise RolloutPoolExhausted(
                f"the rollout backend {type(self.backend).__name__} raised EngineDied in the run's "
                "own process; only mode=cluster starts engines anew"
            )
        return 0

    def stats(self) -> dict[str, float]:
        """Sums since the start."""
        return {
            "busy_seconds": self.busy_seconds,
            "generated_tokens": float(self.generated_tokens),
            "engines": 1.0,
        }

    def close(self) -> None:
        """Idempotent."""
        for _, future in self.waiting:
            future.cancel()
        self.waiting = []
        if not self.loop.is_closed():
            self.loop.run_until_complete(self.backend.close())
            self.loop.close()


class OnDemand(Future):
    """The pool has no thread that could fulfil a future: asking for it does."""

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
