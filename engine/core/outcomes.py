"""What a weight sync and an evaluation come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class SyncReport:
    seconds: float
    bytes: int
    version: int


@dataclass(frozen=True)
class Delivery:
    """What the learner sent, and what each rollout engine says of it; `weights.verify` compares."""

    sent: dict[str, str]  # {parameter: digest}
    installed: list[Installed]  # one per engine
    bytes: int


@dataclass(frozen=True)
class EvalResult:
    accuracy: float  # mean of the verifier, in its own unit
    reward: float  # mean of the weighted sum
    length: float  # mean response tokens
    samples: int
    errors: int
    standard_error: float  # of the accuracy, over problems; NaN with fewer than two of them
    problems: int = 0  # with a scored sample; 0 in what runs before this was counted have recorded

    def describe(self) -> str:
        """What the numbers stand on, in words."""
        counts = [f"{self.problems} problems, {self.samples} samples"]
        if self.errors:
            counts.append(f"{self.errors} without a reward")
        return ", ".join(counts)


class Installed(NamedTuple):
    """What an engine says of an update, before it samples again."""

    received: dict[str, str]  # {parameter: digest} of the bytes as they were received
    version: int  # see Backend.weight_version
    active_digest: str  # see Backend.active_digest
