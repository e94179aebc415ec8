"""What the parts around the learner must do: the learner itself as the loop sees it, the rollout
pool as learner and loop see it, and the engine that holds the optimizer under a learner's rank.

Nothing here imports torch, Ray or an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from tandem.engine.config.names import POLICY
from tandem.engine.core.outcomes import Delivery, Installed
from tandem.engine.core.types import GenRequest, Row, StepPlan, StepReport, Trajectory

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tandem.engine.model.policy import Policy
    from tandem.engine.model.quantities import Quantity
    from tandem.engine.model.view import View


@dataclass(frozen=True)
class PolicySpec:
    """What a method asks of the policy that the learner builds. The learner knows no more of it."""

    critic: bool = False  # whether there is a value head
    embedding: int = 0  # dimensions of its hidden layer, 0: linear
    uses_rollouts: bool = False  # then it computes as the rollout engines do


class Pool(Protocol):
    """Rollout engines: LocalPool (mode=inline, recorded rollouts) or EnginePool (Ray actors)."""

    can_score_logprobs: bool  # whether `logprobs` can be asked

    @property
    def handles(self) -> Sequence[Any]:
        """Ray handles of the engines elsewhere; none if they are in this process."""
        ...

    def install(self, named: Sequence[tuple[str, torch.Tensor]], version: int) -> list[Installed]:
        """Give the engines of this process all parameters; none if they are elsewhere."""
        ...

    def submit(self, request: GenRequest) -> Future[tuple[Trajectory, ...]]:
        """All samples of one request, with the weights that are live now."""
        ...

    def abort(self, request: GenRequest) -> None:
        """Let a submitted request (the very object) end early; its future is answered anyway."""
        ...

    def logprobs(self, tokens: np.ndarray) -> Mapping[int, np.ndarray]:
        """{engine: its log-probs of the tokens}, where the pool `can_score_logprobs`."""
        ...

    def sleep(self) -> None:
        """Give GPU memory to the learner until the next weights."""
        ...

    def restart_dead(self) -> int:
        """Restart dead engines; how many. They serve after the next weights."""
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
        self, rows: Sequence[Row], temperature: float, model: str = POLICY
    ) -> list[np.ndarray]:
        """float32 [T] per row, NaN on tokens that are not trained. `model` is another than the
        policy by its name.
        """
        ...

    def compute_streams(
        self,
        rows: Sequence[Row],
        temperature: float,
        model: str = POLICY,
        quantities: Mapping[str, Quantity] | None = None,
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


class Stepped(NamedTuple):
    """What an optimizer step did."""

    grad_norm: float  # before clipping
    applied: bool  # False: the norm was not finite, weights and moments were left alone


class TrainEngine(Protocol):
    """Weights, optimizer and gradients of one rank: LocalEngine or ZeroEngine.

    * The caller owns the step boundary: any number of `backward` calls, then one `step`. Nothing
      is divided by a number of micro-batches.
    * Losses are parts of a sum that is already divided by its global denominators, so gradients
      are added up over micro-batches and ranks.
    * `step` clips by the global norm and returns that norm as it was before clipping. A norm that
      is not finite leaves weights and moments alone, on all ranks.
    * AdamW works on fp32 master weights, also where the model is bfloat16.
    * AdamW's moments come in named sets, so that two stages of a run can keep theirs apart; a new
      name starts from zero.
    """

    module: Policy
    device: torch.device
    splits_weights: bool  # whether a rank holds a part of each weight: `forward` gathers them

    def forward(self, view: View, custom: Callable | None = None) -> Mapping[str, torch.Tensor]:
        """Policy.forward."""
        ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> Stepped: ...

    def choose_half(self, step: int) -> None:
        """Which half of the parameters the next steps train, for a policy with halves."""
        ...

    def set_optimizer(self, name: str) -> None:
        """Which set of moments the next steps use."""
        ...

    def set_learning_rate(self, value: float) -> None: ...

    def full_parameters(self, adapters: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the checkpoint, tensor in full) on every rank, LoRA's adapters added; or the
        `adapters` alone. A collective.
        """
        ...

    def save(self, folder: str | Path) -> None: ...

    def load(self, folder: str | Path) -> None:
        """Raises ConfigError if the checkpoint was written by another kind of learner."""
        ...

    def close(self) -> None: ...
