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
    from tandem.algorithms.base import Batch, Method, Term
    from tandem.engine.config.schema import Config
    from tandem.engine.core.errors import ConfigError
    from tandem.engine.core.types import Row
    from tandem.engine.learner.inspect import inspect
    from tandem.launch.check_config import load
    from tandem.launch.run.run import train

__version__ = "0.2.0"
__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "Method",
    "Row",
    "Term",
    "inspect",
    "load",
    "train",
]

_HOMES = {
    "Batch": "tandem.algorithms.base:Batch",
    "Config": "tandem.engine.config.schema:Config",
    "ConfigError": "tandem.engine.core.errors:ConfigError",
    "Method": "tandem.algorithms.base:Method",
    "Row": "tandem.engine.core.types:Row",
    "Term": "tandem.algorithms.base:Term",
    "inspect": "tandem.engine.learner.inspect:inspect",
    "load": "tandem.launch.check_config:load",
    "train": "tandem.launch.run.run:train",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'tandem' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
