"""What the loop asks of the two sides of a run: the learner, and the pool of rollout engines.

Nothing here imports torch, Ray or an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tandem.engine.core.types import (
    Delivery,
    GenRequest,
    Row,
    StepPlan,
    StepReport,
    Trajectory,
)

if TYPE_CHECKING:
    import numpy as np


class Pool(Protocol):
    """Rollout engines: LocalPool (mode=inline, recorded rollouts) or EnginePool (vLLM)."""

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        """All samples of one request, with the weights that are live now."""
        ...

    def abort(self, request: GenRequest) -> None:
        """Let a submitted request (the very object) end early; its future is answered anyway."""
        ...

    def logprobs(self, tokens: np.ndarray) -> Mapping[int, np.ndarray]:
        """{engine: its log-probs of the tokens}, where they are not in this process."""
        ...

    def sleep(self) -> None:
        """Give GPU memory to the learner until the next weights."""
        ...

    def recover(self) -> int:
        """Replace dead engines; how many."""
        ...

    def stats(self) -> dict[str, float]:
        """busy_seconds and generated_tokens since the start, and the number of engines."""
        ...

    def close(self) -> None: ...


class Learner(Protocol):
    """All ranks of the policy: InlineLearner or RayLearner."""

    ranks: int
    shares_prompts: bool  # whether the policy runs rows behind one copy of their prompt
    synced: Any  # what weights.verify keeps of the last sync

    def step(self, plan: StepPlan) -> StepReport:
        """One optimizer step."""
        ...

    def logprobs(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> list[np.ndarray]:
        """float32 [T] per row, NaN on tokens that are not trained."""
        ...

    def streams(
        self, rows: Sequence[Row], temperature: float, reference: bool = False
    ) -> dict[str, list[np.ndarray]]:
        """`logp` and, with a critic, `value`: as `logprobs`."""
        ...

    def set_reference(self) -> None:
        """Make the present weights the reference."""
        ...

    def connect(self, pool: Pool) -> None:
        """Make the way that weights take to the engines, anew after some were replaced."""
        ...

    def send(self, version: int) -> Delivery:
        """The present weights to every engine. Raises SyncError or EngineDied."""
        ...

    def save(self, folder: str | Path) -> None:
        """All that an exact resume needs."""
        ...

    def load(self, folder: str | Path) -> None: ...

    def export(self, folder: str | Path) -> None:
        """A plain Hugging Face folder."""
        ...

    def release_memory(self) -> None:
        """Give freed GPU memory back, for an engine on the same GPU."""
        ...

    def rss(self) -> list[int]:
        """Bytes of memory per rank."""
        ...

    def close(self) -> None: ...
