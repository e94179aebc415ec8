"""What the producer keeps of its requests: one ticket a step, one slot a group, and the counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from tandem.algorithms.base import Demand
from tandem.engine.core.types import GenRequest, ScoredGroup, Source, Trajectory


@dataclass(eq=False)
class GroupSlot:
    """One group on its way: requested, generating, scoring, done."""

    request: GenRequest
    from_experts: bool = False  # its prompt is from the prompts that have demonstrations
    # of trajectories; the one it begins with is never answered: the request was not sent yet
    generation: Future = field(default_factory=Future)
    scoring: Future | None = None  # of outcomes
    texts: list[str] = field(default_factory=list)  # of what was generated
    group: ScoredGroup | None = None
    earlier: ScoredGroup | None = None  # the group before the wave that is asked for now
    aborted: bool = False

    @property
    def scored(self) -> bool:
        """Whether the rewards have answered, and with rewards."""
        future = self.scoring
        if future is None or not future.done() or future.cancelled():
            return False
        return future.exception() is None


@dataclass(eq=False)
class Ticket:
    """What one step asked for."""

    step: int
    demand: Demand
    slots: list[GroupSlot] = field(default_factory=list)


@dataclass
class RolloutCounts:
    """How the requests of a run ended, in groups, and the tokens they cost."""

    requested: int = 0
    accepted: int = 0
    filtered: int = 0
    failed: int = 0
    aborted: int = 0  # over-sampled: in flight or finished when the step had its groups
    tokens: int = 0  # that the policy sampled in accepted, filtered and aborted groups

    def check(self, running: int) -> None:
        """Assert that every request ended in one way, or is one of the `running`."""
        ended = self.accepted + self.filtered + self.failed + self.aborted
        assert self.requested == ended + running, (
            f"rollout counts do not balance: {self}, running {running}"
        )

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def of_state(cls, state: Any) -> RolloutCounts:
        """`state_dict`, or the object that version 0.1.0 wrote."""
        values = state if isinstance(state, Mapping) else vars(state)
        return cls(**{one.name: values[one.name] for one in fields(cls)})


def sampled_tokens(trajectories: Iterable[Trajectory]) -> int:
    """Tokens that the policy sampled."""
    return sum(int((t.source == Source.POLICY).sum()) for t in trajectories)
