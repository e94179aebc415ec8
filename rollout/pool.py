"""The rollout pool: N Ray actors with one vLLM engine each, and what to do when one of them dies.

All samples of a request go to one engine, the one with the fewest samples outstanding. An engine is
dead when its actor is gone, its vLLM process is gone, an update of its weights failed, or it had
requests and answered none for rollout.request_timeout seconds; all its requests then fail with
EngineDied. A restarted engine has the weights of the model folder, not the run's: it refuses to
generate until it has taken an update.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied, RolloutPoolExhausted
from tandem.engine.core.loading import user_code
from tandem.engine.core.types import GenRequest, Source, Trajectory
from tandem.rollout.actor import EngineActor, log_path

CLOSE_SECONDS = 20.0  # for an engine to end by itself


@dataclass(eq=False)
class Pending:
    """A request that an engine is working on."""

    request: GenRequest
    result: Future


@dataclass(eq=False)
class Slot:
    """A place for an engine; a restart puts a new actor into it."""

    index: int
    handle: Any
    alive: bool = True
    error: str = ""
    pending: dict[Any, Pending] = field(default_factory=dict)
    busy_seconds: float = 0.0
    busy_since: float | None = None
    heard: float = 0.0  # when it last answered, or began to work after a pause

    @property
    def load(self) -> int:
        return sum(p.request.samples for p in self.pending.values())


class EnginePool:
    """Answers, deaths and timeouts are handled in one thread of the pool's own, which also runs the
    callbacks of its futures: inside Ray's callback threads a call to Ray would wait for itself.
    """

    backends = ()  # none in this process

    def __init__(self, config: Config, model_path: str, placement, run_dir: str | Path):
        self.config, self.model_path, self.placement, self.run_dir = (
            config,
            model_path,
            placement,
            Path(run_dir).absolute(),
        )
        # as it was at the start, also for an engine that is started later
        self.code = user_code()
        self.lock = threading.RLock()
        self.restarts, self.generated_tokens = 0, 0
        # (slot, handle, ref, Ray's future); None ends the thread
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="rollout_pool", daemon=True)
        self.slots: list[Slot] = []

    @classmethod
    def start(cls, config: Config, model_path: str, placement, run_dir: str | Path) -> EnginePool:
        """Start all engines side by side.

        Raises RuntimeError with the end of its log if one does not come up within
        cluster.start_timeout.
        """
        pool = cls(config, model_path, placement, run_dir)
        pool.slots = [Slot(i, pool.actor(i, stale=False)) for i in range(config.cluster.engines)]
        try:
            pool.wait_started(pool.slots)
        except stop.Stopped:
            for slot in pool.slots:
                pool.bury(slot, slot.handle, "the start was stopped")
            raise
        except BaseException:
            pool.close()
            raise
        pool.thread.start()
        return pool

    def actor(self, index: int, stale: bool):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        cluster = self.config.cluster
        place = PlacementGroupSchedulingStrategy(
            self.placement.group, placement_group_bundle_index=self.placement.engine_bundle(index)
        )
        return (
            ray.remote(EngineActor)
            .options(
                num_cpus=cluster.engine_cpus,
                num_gpus=cluster.engine_gpus,
                max_restarts=0,
                scheduling_strategy=place,
                runtime_env={"env_vars": dict(self.placement.engine_env)},
            )
            .remote(index, self.config, self.model_path, str(self.run_dir), stale, self.code)
        )

    def wait_started(self, slots: list[Slot]) -> None:
        import ray

        deadline = time.monotonic() + self.config.cluster.start_timeout
        for slot, ref in [(slot, slot.handle.start.remote()) for slot in slots]:
            while time.monotonic() < deadline and not ray.wait([ref], timeout=stop.LOOK_SECONDS)[0]:
                stop.check_start()
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except ray.exceptions.RayError as error:
                path = log_path(self.run_dir, slot.index)
                tail = (
                    "\n  ".join(path.read_text(errors="replace").splitlines()[-15:])
                    if path.exists()
                    else "(on another machine)"
                )
                late = isinstance(error, ray.exceptions.GetTimeoutError)
                reason = (
                    f"not up after cluster.start_timeout={self.config.cluster.start_timeout:g} s"
                    if late
                    else str(error)
                )
                raise RuntimeError(
                    f"rollout engine {slot.index} did not start: {reason}\nend of {path}:\n  {tail}"
                ) from error

    # -- generation

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        """The future fails with EngineDied if its engine dies, and with SyncError if its engine has
        stale weights.
        """
        result: Future[tuple[Trajectory, ...]] = Future()
        # an engine cannot give a request back, so it cannot be cancelled
        result.set_running_or_notify_cancel()
        with self.lock:
            living = [slot for slot in self.slots if slot.alive]
            if not living:
                result.set_exception(
                    EngineDied(
                        "no rollout engine is alive: "
                        + "; ".join(f"engine {s.index}: {s.error}" for s in self.slots)
                    )
                )
                return result
            slot = min(living, key=lambda s: (s.load, s.index))
            handle = slot.handle
            ref = handle.generate.remote(request)
            slot.pending[ref] = Pending(request, result)
            if slot.busy_since is None:
                slot.busy_since = slot.heard = time.monotonic()
        ref.future().add_done_callback(lambda done: self.answers.put((slot, handle, ref, done)))
        return result

    def abort(self, request: GenRequest) -> None:
        """Let a submitted request (the very object) end early; returns at once.

        Its future is answered all the same, soon, and its engine is busy with it until then;
        samples that had not ended have Finish.ABORT. Nothing happens if it was answered.
        """
        with self.lock:
            handles = [
                slot.handle
                for slot in self.slots
                for pending in slot.pending.values()
                if pending.request is request
            ]
        for handle in handles:
            handle.abort.remote(request)

    def sleep(self) -> None:
        """Let every engine give its GPU memory away until the next weight update, once it has
        answered what it still works on (the end of an aborted request). Those that sleep already
        are left alone; one that fails counts as dead, which the next update finds.
        """
        import ray

        # ends: an engine that stays silent is buried
        while any(slot.pending for slot in self.slots if slot.alive):
            time.sleep(0.005)
        for slot, ref in [(slot, slot.handle.sleep.remote()) for slot in self.slots if slot.alive]:
            try:
                ray.get(ref, timeout=self.config.rollout.request_timeout)
            except ray.exceptions.RayError as error:
                self.bury(slot, slot.handle, first_line(getattr(error, "cause", None) or error))

    def logprobs(self, tokens: np.ndarray) -> dict[int, np.ndarray]:
        """{engine: VllmBackend.logprobs of `tokens`}.

        One that dies over it is left out, and found by the next update.
        """
        import ray

        found = {}
        for slot, ref in [
            (slot, slot.handle.logprobs.remote(tokens)) for slot in self.slots if slot.alive
        ]:
            try:
                found[slot.index] = ray.get(ref, timeout=self.config.rollout.request_timeout)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                if not isinstance(cause, EngineDied) and not is_actor_error(error):
                    raise
                self.bury(slot, slot.handle, first_line(cause))
        return found

    def work(self) -> None:
        """The pool's thread."""
        limit = self.config.rollout.request_timeout
        while True:
            try:
                answer = self.answers.get(timeout=min(1.0, limit / 4))
            except queue.Empty:
                with self.lock:
                    late = [
                        (slot, slot.handle)
                        for slot in self.slots
                        if slot.pending and time.monotonic() - slot.heard > limit
                    ]
                for slot, handle in late:
                    self.bury(slot, handle, f"no answer within rollout.request_timeout={limit:g} s")
                continue
            if answer is None:
                return
            self.finish(*answer)

    def finish(self, slot: Slot, handle, ref, done: Future) -> None:
        """One answer of an engine."""
        error = done.exception()
        cause = getattr(error, "cause", None) or error
        if isinstance(cause, EngineDied) or is_actor_error(error):
            self.bury(slot, handle, first_line(cause))
            return
        with self.lock:
            pending = self.retire(slot, ref)
            if pending is None:
                return  # it failed before, together with its engine
            slot.heard = time.monotonic()
            if error is None:
                self.generated_tokens += sum(
                    int((t.source == Source.POLICY).sum()) for t in done.result()
                )
        if error is None:
            pending.result.set_result(done.result())
        else:
            pending.result.set_exception(cause)

    def retire(self, slot: Slot, ref) -> Pending | None:
        pending = slot.pending.pop(ref, None)
        if pending is not None and not slot.pending:
            slot.busy_seconds += time.monotonic() - slot.busy_since
            slot.busy_since = None
        return pending

    # -- death and recovery

    def bury(self, slot: Slot, handle, reason: str) -> None:
        """Mark the engine `handle` dead, end its actor and fail everything it was working on.

        News of an engine that was replaced since changes nothing.
        """
        import ray

        with self.lock:
            if not slot.alive or slot.handle is not handle:
                return
            slot.alive, slot.error = False, reason
            lost = [self.retire(slot, ref) for ref in list(slot.pending)]
        ray.kill(handle)  # vLLM's process notices within a second and ends
        for pending in lost:
            pending.result.set_exception(EngineDied(f"engine {slot.index}: {reason}"))

    def recover(self) -> int:
        """Restart every engine that is dead, unhealthy or stuck in a weight update; returns how
        many. They serve only after the next weight update.

        Raises RolloutPoolExhausted when that takes more restarts than rollout.max_restarts. Not to
        be called while weights are being sent.
        """
        import ray

        checks = [
            (slot, slot.handle.health.remote(), slot.handle.updating.remote())
            for slot in self.slots
            if slot.alive
        ]
        for slot, health, updating in checks:
            try:
                if ray.get([health, updating], timeout=CLOSE_SECONDS)[1]:
                    self.bury(slot, slot.handle, "a weight update was begun and never finished")
            except ray.exceptions.RayError as error:
                self.bury(slot, slot.handle, first_line(getattr(error, "cause", None) or error))
        dead = [slot for slot in self.slots if not slot.alive]
        if self.restarts + len(dead) > self.config.rollout.max_restarts:
            raise RolloutPoolExhausted(
                f"{len(dead)} rollout engine(s) dead after {self.restarts} restarts, "
                "rollout.max_restarts is "
                f"{self.config.rollout.max_restarts}; last errors:\n"
                + "\n".join(f"  engine {s.index}: {s.error}" for s in dead)
            )
        self.restarts += len(dead)
        # without a learner, as in an evaluation, the model folder's weights are the run's
        stale = not self.config.run.rollout_only
        for slot in dead:
            slot.handle = self.actor(slot.index, stale)
        self.wait_started(dead)
        with self.lock:
            for slot in dead:
                slot.alive, slot.error = True, ""
        return len(dead)

    # -- the rest

    @property
    def handles(self) -> list[Any]:
        """Actor handles of the engines that are alive."""
        with self.lock:
            return [slot.handle for slot in self.slots if slot.alive]

    def stats(self) -> dict[str, float]:
        """Totals since the start: busy_seconds (summed over engines), generated_tokens, restarts;
        engines alive; prefix_cache_hit_rate of the living.
        """
        import ray

        now = time.monotonic()
        with self.lock:
            busy = sum(
                s.busy_seconds + (now - s.busy_since if s.busy_since is not None else 0.0)
                for s in self.slots
            )
            tokens, handles = self.generated_tokens, self.handles
        stats = {
            "busy_seconds": busy,
            "generated_tokens": float(tokens),
            "engines": float(len(handles)),
            "restarts": float(self.restarts),
        }
        try:
            counts = ray.get([handle.cache_counts.remote() for handle in handles], timeout=5.0)
        except ray.exceptions.RayError:
            return stats  # a dying engine; whoever waits for its rollouts will be told
        return {
            **stats,
            "prefix_cache_hit_rate": sum(c for _, c in counts) / max(1, sum(p for p, _ in counts)),
        }

    def close(self) -> None:
        """End all engines and their processes; unanswered requests fail with EngineDied.

        Idempotent.
        """
        import ray

        if self.thread.is_alive():
            self.answers.put(None)
            self.thread.join()
        if not ray.is_initialized():
            return
        with self.lock:
            living = [slot for slot in self.slots if slot.alive]
        refs = [slot.handle.close.remote() for slot in living]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=CLOSE_SECONDS)
        for slot in living:
            self.bury(slot, slot.handle, "the pool was closed")


def first_line(error: BaseException) -> str:
    """Ray's errors are a page long."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_actor_error(error: BaseException | None) -> bool:
    import ray

    return isinstance(error, (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError))
