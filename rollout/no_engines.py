"""The rollout pool of a run that never generates: no process, no model, no weights to take."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from tandem.engine.core.outcomes import Installed
from tandem.engine.core.types import GenRequest, Trajectory


class NoEngines:
    """Same surface as the other pools. The loop sends no weights to it."""

    can_score_logprobs = False
    handles = ()

    def install(self, named: Sequence, version: int) -> list[Installed]:
        return []

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        raise AssertionError("rollouts were asked for in a run without engines")

    def abort(self, request: GenRequest) -> None:
        """No request is under way."""

    def logprobs(self, tokens: np.ndarray) -> dict[int, np.ndarray]:
        return {}

    def sleep(self) -> None:
        """There is no GPU memory to give away."""

    def restart_dead(self) -> int:
        return 0

    def stats(self) -> dict[str, float]:
        return {"busy_seconds": 0.0, "generated_tokens": 0.0, "engines": 0.0}

    def close(self) -> None:
        """Nothing was started."""
