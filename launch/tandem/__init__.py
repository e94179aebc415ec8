"""Tandem: SFT on demonstrations and RL on own samples as one training loop.

The public face: what scripts, method files and notebooks import. Names are resolved on first use,
so that `import tandem` is light.

    config = tandem.load("config.yaml", ["run.steps=10"])
    tandem.train(config)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.algorithms.base import Batch, Demand, Method, Term
    from tandem.algorithms.parts import advantages
    from tandem.algorithms.parts.demos import DemoLoss
    from tandem.algorithms.parts.objectives.nll import NLL
    from tandem.algorithms.parts.objectives.policy import PPOClip
    from tandem.algorithms.parts.objectives.tokens import Tokens
    from tandem.algorithms.parts.objectives.units import Groups, Units
    from tandem.algorithms.parts.policy import PolicyLoss
    from tandem.algorithms.parts.schedules import Schedule
    from tandem.algorithms.registry import make_method
    from tandem.algorithms.rl_method import RLMethod
    from tandem.algorithms.rows import expert_row, policy_row
    from tandem.engine.config.names import logp_of
    from tandem.engine.config.schema import Config
    from tandem.engine.core.errors import ConfigError
    from tandem.engine.core.types import Row
    from tandem.engine.learner.by_hand import group, pair, trajectory
    from tandem.engine.learner.inspect import inspect
    from tandem.engine.model.quantities import Divergence
    from tandem.launch.check_config import load
    from tandem.launch.run.run import train

__version__ = "0.2.0"
__all__ = [
    "NLL",
    "Batch",
    "Config",
    "ConfigError",
    "Demand",
    "DemoLoss",
    "Divergence",
    "Groups",
    "Method",
    "PPOClip",
    "PolicyLoss",
    "RLMethod",
    "Row",
    "Schedule",
    "Term",
    "Tokens",
    "Units",
    "advantages",
    "expert_row",
    "group",
    "inspect",
    "load",
    "logp_of",
    "make_method",
    "pair",
    "policy_row",
    "train",
    "trajectory",
]

# where each name lives: module:attribute, or a module of its own
_HOMES = {
    "NLL": "tandem.algorithms.parts.objectives.nll:NLL",
    "Batch": "tandem.algorithms.base:Batch",
    "Config": "tandem.engine.config.schema:Config",
    "ConfigError": "tandem.engine.core.errors:ConfigError",
    "Demand": "tandem.algorithms.base:Demand",
    "DemoLoss": "tandem.algorithms.parts.demos:DemoLoss",
    "Divergence": "tandem.engine.model.quantities:Divergence",
    "Groups": "tandem.algorithms.parts.objectives.units:Groups",
    "Method": "tandem.algorithms.base:Method",
    "PPOClip": "tandem.algorithms.parts.objectives.policy:PPOClip",
    "PolicyLoss": "tandem.algorithms.parts.policy:PolicyLoss",
    "RLMethod": "tandem.algorithms.rl_method:RLMethod",
    "Row": "tandem.engine.core.types:Row",
    "Schedule": "tandem.algorithms.parts.schedules:Schedule",
    "Term": "tandem.algorithms.base:Term",
    "Tokens": "tandem.algorithms.parts.objectives.tokens:Tokens",
    "Units": "tandem.algorithms.parts.objectives.units:Units",
    "advantages": "tandem.algorithms.parts.advantages",
    "expert_row": "tandem.algorithms.rows:expert_row",
    "group": "tandem.engine.learner.by_hand:group",
    "inspect": "tandem.engine.learner.inspect:inspect",
    "load": "tandem.launch.check_config:load",
    "logp_of": "tandem.engine.config.names:logp_of",
    "make_method": "tandem.algorithms.registry:make_method",
    "pair": "tandem.engine.learner.by_hand:pair",
    "policy_row": "tandem.algorithms.rows:policy_row",
    "train": "tandem.launch.run.run:train",
    "trajectory": "tandem.engine.learner.by_hand:trajectory",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = import_module(module)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
