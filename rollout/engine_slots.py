"""What the pool keeps of each of its engines."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from tandem.engine.core.types import GenRequest


@dataclass(eq=False)
class Pending:
    """A request that an engine is working on."""

    request: GenRequest
    result: Future


@dataclass(eq=False)
class EngineSlot:
    """One engine of the pool: its actor, which a restart replaces, and what it works on."""

    index: int
    handle: Any
    alive: bool = True
    error: str = ""
    pending: dict[Any, Pending] = field(default_factory=dict)
    busy_seconds: float = 0.0
    busy_since: float | None = None
    last_answer: float = 0.0  # when it last answered, or began to work after a pause

    @property
    def load(self) -> int:
        return sum(p.request.samples for p in self.pending.values())
