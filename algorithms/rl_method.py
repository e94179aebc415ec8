"""The base of every method with an RL half, whose options are `policy:` in a config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.algorithms.base import Method
from tandem.algorithms.parts.policy import PolicyLoss
from tandem.engine.core.types import ScoredGroup


def not_given() -> Any:
    """Becomes the method's own policy in `__post_init__`."""
    return {}


@dataclass
class RLMethod(Method):
    """A method with a field `policy`, which decides over accepting groups.

    `policy` may be given as in a config, a preset's name or a mapping of options, also in Python:
    `GRPO(policy="dapo")`. A subclass with a `__post_init__` of its own begins it with
    `super().__post_init__()`.
    """

    policy: PolicyLoss = field(default_factory=not_given, kw_only=True, metadata={"as_given": True})

    def __post_init__(self):
        self.policy = PolicyLoss.parse(self.policy, **self.policy_defaults())

    def policy_defaults(self) -> dict[str, Any]:
        """The options of `policy` where the config gives none; may name a `preset`."""
        return {}

    def accept(self, group: ScoredGroup) -> bool:
        return self.policy.accept(group)
