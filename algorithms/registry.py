"""Methods by name, and a method built from the options of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tandem.algorithms.base import Method
from tandem.engine.config.options import build
from tandem.engine.core.loading import load_object

# name -> "module:Class"; imported on use, so that listing methods costs nothing and one broken file
# breaks one method
METHODS: dict[str, str] = {
    "sft": "tandem.algorithms.sft.sft:SFT",
    "grpo": "tandem.algorithms.rl.grpo:GRPO",
    "sft_rl": "tandem.algorithms.staged.sft_rl:SFTThenRL",
    "static_mix": "tandem.algorithms.hybrid.static_mix:StaticMix",
    "rl_with_sft": "tandem.algorithms.hybrid.rl_with_sft:RLWithSFT",
    "alternating": "tandem.algorithms.staged.alternating:Alternating",
    "chord_mu": "tandem.algorithms.hybrid.chord_mu:ChordMu",
    "chord_phi": "tandem.algorithms.hybrid.chord_phi:ChordPhi",
    "sft_is": "tandem.algorithms.hybrid.sft_is:SFTIS",
    "luffy": "tandem.algorithms.hybrid.luffy:LUFFY",
    "srft": "tandem.algorithms.hybrid.srft:SRFT",
    "prefix_rft": "tandem.algorithms.hybrid.prefix_rft:PrefixRFT",
    "uft": "tandem.algorithms.hybrid.uft:UFT",
    "hpt": "tandem.algorithms.hybrid.hpt:HPT",
    "visurf": "tandem.algorithms.hybrid.visurf:ViSurf",
    "relift": "tandem.algorithms.staged.relift:ReLIFT",
    "sasr": "tandem.algorithms.staged.sasr:SASR",
    "ppo": "tandem.algorithms.rl.ppo:PPO",
    "reft": "tandem.algorithms.staged.reft:ReFT",
    "ift": "tandem.algorithms.sft.ift:IFT",
    "carft": "tandem.algorithms.hybrid.carft:CARFT",
}


def method_class(name: str) -> type[Method]:
    """The class of a registered method, or of a user's `file.py:Class`.

    Raises ValueError for anything else.
    """
    if name not in METHODS and ":" not in name:
        from tandem.engine.core.text import closest

        raise ValueError(
            f"unknown method {name!r}{closest(name, METHODS)}; known: {', '.join(METHODS)}, "
            "or a path my_method.py:MyMethod"
        )
    cls = load_object(METHODS.get(name, name), "method")
    if not (isinstance(cls, type) and issubclass(cls, Method) and dataclasses.is_dataclass(cls)):
        raise ValueError(
            f"method {name!r} is {cls!r}; expected a dataclass that inherits "
            "tandem.algorithms.base.Method"
        )
    options = [
        field
        for field, kind in cls.__dict__.get("__annotations__", {}).items()
        if "ClassVar" not in str(kind)
    ]
    if options and "__dataclass_fields__" not in cls.__dict__:
        raise ValueError(
            f"method {name!r}: {cls.__name__} declares {', '.join(options)} but is no "
            "dataclass of its own, so they would be ignored; put @dataclass above it"
        )
    return cls


def configured(block: Mapping[str, Any]) -> Method:
    """The method of a config's `method:` block, `name` and options."""
    return make_method(block["name"], {key: value for key, value in block.items() if key != "name"})


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """Build a method from the config's `method:` block; unknown options and values of the wrong
    type are a ValueError that names the key.
    """
    return build(method_class(name), options, "method", f"method {name!r}")
