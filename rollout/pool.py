"""The rollout pool: N Ray actors with one engine each, and what to do when one of them dies.

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
from pathlib import Path
from typing import Any

import numpy as np

from tandem.engine.config.schema import Config
from tandem.engine.core import stop
from tandem.engine.core.errors import EngineDied, RolloutPoolExhausted
from tandem.engine.core.loading import user_code
from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Trajectory
from tandem.rollout.actor import EngineActor, end_of, log_path
from tandem.rollout.backend import backend_class, overrides
from tandem.rollout.engine_slots import EngineSlot, Pending
from tandem.rollout.ray_errors import cause_of, is_death, why_died
from tandem.rollout.trajectories import sampled

CLOSE_SECONDS = 20.0  # for an engine to end by itself


class EnginePool:
    """All rollout engines of a run: gives them requests, and replaces those that die.

    Answers, deaths and timeouts are handled in one thread of the pool's own, which also runs the
    callbacks of its futures: inside Ray's callback threads a call to Ray would wait for itself.
    """

    def __init__(self, config: Config, model_path: str, placement, run_dir: str | Path):
        self.config, self.model_path, self.placement = config, model_path, placement
        self.run_dir = Path(run_dir).absolute()
        # loaded here, so that a user's own is among the code that travels
        backend = backend_class(config)
        self.can_score_logprobs = overrides(backend, "logprobs")
        # as it was at the start, also for an engine that is started later
        self.code = user_code()
        self.lock = threading.RLock()
        self.restarts, self.generated_tokens = 0, 0
        # (slot, handle, ref, Ray's future); None ends the thread
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.work, name="rollout_pool", daemon=True)
        self.slots: list[EngineSlot] = []

    @classmethod
    def start(cls, config: Config, model_path: str, placement, run_dir: str | Path) -> EnginePool:
        """Start all engines side by side.

        Raises RuntimeError with the end of its log if one does not come up within
        cluster.start_timeout.
        """
        pool = cls(config, model_path, placement, run_dir)
        pool.slots = [
            EngineSlot(i, pool.actor(i, stale=False)) for i in range(config.cluster.engines)
        ]
        try:
            pool.wait_started(pool.slots)
        except stop.Stopped:
            for slot in pool.slots:
                pool.kill_engine(slot, slot.handle, "the start was stopped")
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
        strategy = PlacementGroupSchedulingStrategy(
            self.placement.group, placement_group_bundle_index=self.placement.engine_bundle(index)
        )
        return (
            ray.remote(EngineActor)
            .options(
                num_cpus=cluster.engine_cpus,
                num_gpus=cluster.engine_gpus,
                max_restarts=0,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": dict(self.placement.engine_env)},
            )
            .remote(index, self.config, self.model_path, str(self.run_dir), stale, self.code)
        )

    def wait_started(self, slots: list[EngineSlot]) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        limit = self.config.cluster.start_timeout
        deadline = time.monotonic() + limit
        starting = {slot.index: slot.handle.start.remote() for slot in slots}
        for index, ref in starting.items():
            while time.monotonic() < deadline and not ray.wait([ref], timeout=stop.LOOK_SECONDS)[0]:
                stop.check_start()
            try:
                ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                reason = str(error)
                if isinstance(error, GetTimeoutError):
                    reason = f"not up after cluster.start_timeout={limit:g} s"
                path = log_path(self.run_dir, index)
                raise RuntimeError(
                    f"rollout engine {index} did not start: {reason}\n"
                    f"end of {path}:\n  {end_of(path)}"
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
                errors = [f"engine {slot.index}: {slot.error}" for slot in self.slots]
                result.set_exception(EngineDied(f"no rollout engine is alive: {'; '.join(errors)}"))
                return result
            slot = min(living, key=lambda slot: (slot.load, slot.index))
            handle = slot.handle
            ref = handle.generate.remote(request)
            slot.pending[ref] = Pending(request, result)
            if slot.busy_since is None:
                slot.busy_since = slot.last_answer = time.monotonic()
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
        from ray.exceptions import RayError

        # Terminates because an engine that stays silent is marked dead.
        while any(slot.pending for slot in self.slots if slot.alive):
            time.sleep(0.005)
        for slot, ref in [(slot, slot.handle.sleep.remote()) for slot in self.slots if slot.alive]:
            try:
                ray.get(ref, timeout=self.config.rollout.request_timeout)
            except RayError as error:
                self.kill_engine(slot, slot.handle, why_died(error))

    def logprobs(self, tokens: np.ndarray) -> dict[int, np.ndarray]:
        """{engine: Backend.logprobs of `tokens`}; only where the pool `can_score_logprobs`.

        One that dies over it, or is silent for rollout.request_timeout, counts as dead and is left
        out; the next update restarts it.
        """
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        living = [slot for slot in self.slots if slot.alive]
        asked = [(slot, slot.handle.logprobs.remote(tokens)) for slot in living]
        found = {}
        for slot, ref in asked:
            try:
                found[slot.index] = ray.get(ref, timeout=self.config.rollout.request_timeout)
            except RayError as error:
                if not is_death(error) and not isinstance(error, GetTimeoutError):
                    raise
                self.kill_engine(slot, slot.handle, why_died(error))
        return found

    def work(self) -> None:
        """The pool's thread: takes the answers, and looks for engines that are late."""
        limit = self.config.rollout.request_timeout
        while True:
            if self.answers.empty():  # an answer that waits here may be the late engine's
                self.kill_late(limit)
            try:
                answer = self.answers.get(timeout=min(1.0, limit / 4))
            except queue.Empty:
                continue
            if answer is None:
                return
            self.handle_answer(*answer)

    def kill_late(self, limit: float) -> None:
        """End every engine that has requests and answered none for `limit` seconds."""
        now = time.monotonic()
        with self.lock:
            working = [(slot, slot.handle) for slot in self.slots if slot.pending]
        for slot, handle in working:
            if now - slot.last_answer > limit:
                reason = f"no answer within rollout.request_timeout={limit:g} s"
                self.kill_engine(slot, handle, reason)

    def handle_answer(self, slot: EngineSlot, handle, ref, done: Future) -> None:
        """One answer of an engine."""
        error = done.exception()
        if error is not None and is_death(error):
            self.kill_engine(slot, handle, why_died(error))
            return
        with self.lock:
            pending = self.pop_pending(slot, ref)
            if pending is None:
                return  # it failed before, together with its engine
            slot.last_answer = time.monotonic()
            if error is None:
                self.generated_tokens += sampled(done.result())
        if error is None:
            pending.result.set_result(done.result())
        else:
            pending.result.set_exception(cause_of(error))

    def pop_pending(self, slot: EngineSlot, ref) -> Pending | None:
        pending = slot.pending.pop(ref, None)
        if pending is not None and not slot.pending and slot.busy_since is not None:
            slot.busy_seconds += time.monotonic() - slot.busy_since
            slot.busy_since = None
        return pending

    # -- death and recovery

    def kill_engine(self, slot: EngineSlot, handle, reason: str) -> None:
        """End the actor `handle` of a slot and fail everything it was working on.

        News of an engine that was replaced since changes nothing.
        """
        import ray

        with self.lock:
            if not slot.alive or slot.handle is not handle:
                return
            slot.alive, slot.error = False, reason
            lost = [self.pop_pending(slot, ref) for ref in list(slot.pending)]
        ray.kill(handle)  # vLLM's process notices within a second and ends
        for pending in lost:
            if pending is not None:
                pending.result.set_exception(EngineDied(f"engine {slot.index}: {reason}"))

    def restart_dead(self) -> int:
        """Restart every engine that is dead, unhealthy or stuck in a weight update; returns how
        many. They serve only after the next weight update.

        Raises RolloutPoolExhausted when that takes more restarts than rollout.max_restarts. Not to
        be called while weights are being sent.
        """
        self.kill_unhealthy()
        dead = [slot for slot in self.slots if not slot.alive]
        limit = self.config.rollout.max_restarts
        if self.restarts + len(dead) > limit:
            errors = [f"  engine {slot.index}: {slot.error}" for slot in dead]
            raise RolloutPoolExhausted(
                f"{len(dead)} rollout engine(s) dead after {self.restarts} restarts, "
                f"rollout.max_restarts is {limit}; last errors:\n" + "\n".join(errors)
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

    def kill_unhealthy(self) -> None:
        """Ask every engine that counts as alive whether it is."""
        import ray
        from ray.exceptions import RayError

        living = [slot for slot in self.slots if slot.alive]
        asked = [
            (slot, slot.handle.health.remote(), slot.handle.updating.remote()) for slot in living
        ]
        for slot, health, updating in asked:
            try:
                _, in_update = ray.get([health, updating], timeout=CLOSE_SECONDS)
                if in_update:
                    reason = "a weight update was begun and never finished"
                    self.kill_engine(slot, slot.handle, reason)
            except RayError as error:
                self.kill_engine(slot, slot.handle, why_died(error))

    # -- the rest

    def install(self, named, version: int) -> list[Installed]:
        """There is no engine in this process: `handles` are sent to."""
        return []

    @property
    def handles(self) -> list[Any]:
        """Actor handles of the engines that are alive."""
        with self.lock:
            return [slot.handle for slot in self.slots if slot.alive]

    def stats(self) -> dict[str, float]:
        """Totals since the start: busy_seconds (summed over engines), generated_tokens, restarts;
        engines alive; prefix_cache_hit_rate of the living, where they count.
        """
        import ray
        from ray.exceptions import RayError

        now, busy = time.monotonic(), 0.0
        with self.lock:
            for slot in self.slots:
                busy += slot.busy_seconds
                if slot.busy_since is not None:
                    busy += now - slot.busy_since
            tokens, handles = self.generated_tokens, self.handles
        stats = {
            "busy_seconds": busy,
            "generated_tokens": float(tokens),
            "engines": float(len(handles)),
            "restarts": float(self.restarts),
        }
        try:
            counts = ray.get([handle.cache_counts.remote() for handle in handles], timeout=5.0)
        except RayError:
            return stats  # a dying engine; whoever waits for its rollouts will be told
        known = [count for count in counts if count is not None]
        if known:
            cached = sum(count.cached_tokens for count in known)
            total = sum(count.prompt_tokens for count in known)
            stats["prefix_cache_hit_rate"] = cached / max(1, total)
        return stats

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
            self.kill_engine(slot, slot.handle, "the pool was closed")
