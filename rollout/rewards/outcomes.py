"""From what the reward functions said of one sample to its outcome."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.engine.core.types import RewardError, RewardOutcome
from tandem.rollout.rewards.values import Failure, weighted_sum


@dataclass(frozen=True)
class Part:
    """What one function said: a number, None where it does not apply, or what went wrong."""

    name: str  # as metrics call the function
    weight: float
    value: float | RewardError | None
    traceback: str = ""


@dataclass(frozen=True)
class Judged:
    outcome: RewardOutcome
    complaints: tuple[str, ...] = ()  # for people, if there is no reward


def judge(sample: str, parts: Sequence[Part], functions: str) -> Judged:
    """The weighted sum of all parts that apply. One error is enough for there to be no reward.

    `sample` and `functions` are what complaints call the sample, and all functions together.
    """
    found: dict[str, float] = {}
    weighted: list[tuple[float, float]] = []
    errors: list[RewardError] = []
    complaints: list[str] = []
    for part in parts:
        value = part.value
        if isinstance(value, RewardError):
            errors.append(value)
            words = f"{sample}, reward {value.function!r}: {value.kind}: {value.message}"
            complaints.append(f"{words}\n{part.traceback}".rstrip())
        elif value is not None:
            found[part.name] = value
            weighted.append((part.weight, value))
    if errors:
        outcome = RewardOutcome(None, found, errors[0])
        return Judged(outcome, tuple(complaints))
    if not found:
        words = "every function returned None, so no reward applies to this sample"
        error = RewardError("not_finite", words, functions)
        outcome = RewardOutcome(None, found, error)
        return Judged(outcome, (f"{sample}: {words}",))
    total = weighted_sum(weighted)
    if isinstance(total, Failure):
        error = RewardError(total.kind, total.message, functions)
        weights = [part.weight for part in parts]
        words = f"{total.message}; the parts: {found}, reward.weights {weights}"
        outcome = RewardOutcome(None, found, error)
        return Judged(outcome, (f"{sample}: {words}",))
    return Judged(RewardOutcome(total, found))
