"""The learner's calls to all engines."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tandem.engine.core.errors import EngineDied, SyncError
from tandem.engine.core.text import first_line


class PoolClient:
    """vLLM's weight-sync control plane over Ray actor handles: each call goes to all engines at
    once and ends by `deadline`.

    vLLM's own Ray client gives every engine the same rank, which is wrong for more than one.
    `installed` is what each engine says after the last update.
    """

    def __init__(self, handles: Sequence[Any], timeout: float):
        self.handles, self.timeout = list(handles), timeout
        self.version, self.installed = -1, []
        self.restart_clock()
        self.ranks = self.call_all("transfer_ranks")

    def restart_clock(self) -> None:
        self.deadline = time.monotonic() + self.timeout

    def call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self.call(method, [arguments] * len(self.handles))

    def call(self, method: str, arguments: Sequence[tuple]) -> list[Any]:
        """method(*arguments[i]) on engine i. The first failure is raised at once, without waiting
        for the others: EngineDied if an engine is gone or does not answer in time, SyncError if it
        answers with an error.
        """
        import ray

        refs = [
            getattr(handle, method).remote(*args)
            for handle, args in zip(self.handles, arguments, strict=True)
        ]
        waiting, answers = refs, {}
        while waiting:
            left = max(0.0, self.deadline - time.monotonic())
            done, waiting = ray.wait(waiting, timeout=left, fetch_local=False)
            if not done:
                raise EngineDied(
                    f"engine(s) {[refs.index(ref) for ref in waiting]} did not answer {method} "
                    f"within sync.timeout={self.timeout:g} s"
                )
            for ref in done:
                answers[ref] = answer_of(ref, refs.index(ref), method)
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
        self.call_all("health")
        self.call_all("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.call_all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's trainer engines pass no version; it was set by Sender.send."""
        self.installed = self.call_all("finish_weight_update", self.version)


def answer_of(ref, engine: int, method: str) -> Any:
    """What an engine answered. Raises EngineDied or SyncError."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return ray.get(ref)
    except RayActorError as error:
        raise EngineDied(f"engine {engine} died in {method}: {first_line(error)}") from error
    except RayTaskError as error:
        if isinstance(error.cause, EngineDied):
            raise EngineDied(f"engine {engine} failed in {method}: {error.cause}") from error
        cause = error.cause if isinstance(error.cause, SyncError) else error
        raise SyncError(f"engine {engine} failed in {method}: {cause}") from error
