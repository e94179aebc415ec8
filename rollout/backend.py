"""The rollout seam: what an inference engine must do to serve rollouts and take new weights.

The weight calls mirror vLLM's own weight-transfer client (init, start, update, finish), so a
backend around vLLM passes them through. `tests/contract/test_backends.py` is the suite that every
backend, a user's too, must pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tandem.engine.core.types import GenRequest, Installed, Trajectory


class Backend(Protocol):
    """One inference engine. All calls are coroutines; in-process backends simply do not await."""

    async def generate(self, request: GenRequest) -> Sequence[Trajectory]:
        """All samples of one request: POLICY tokens carry the log-prob under the distribution they
        were sampled from and the weight version.
        """

    async def abort(self, request: GenRequest) -> None:
        """Let a running request end early: its `generate` returns soon, samples that had not ended
        as they are, with Finish.ABORT. One that is not running is none of its business. A backend
        that computes while it is called has nothing to do here.
        """

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Join the transfer group of the learner."""

    async def start_weight_update(self) -> None:
        """No weight is changed before this call. Running requests are paused and kept."""

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive a set of parameters in checkpoint format."""

    async def finish_weight_update(self, version: int) -> Installed:
        """Make the new weights live, drop caches computed with the old ones, stamp `version` on all
        tokens sampled from now on.

        Returns what `weights.sync` compares with what the learner sent and with the other engines.
        It is found before running requests go on: asked later, an engine would answer between two
        of its steps only, and the learner would wait for them.
        """

    async def weight_version(self) -> int:
        """The version that tokens are stamped with now."""

    async def held_digest(self) -> str:
        """One digest over the weights the engine computes with, in its own layout: equal on equal
        engines, changed by every real update.
        """

    async def health(self) -> None:
        """Raise EngineDied if the engine cannot serve."""

    async def close(self) -> None:
        """Release everything; no child process may survive."""
