"""The keys of `scope`, in the way of schema.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.engine.config.kinds import Dropout, Flag, FromOne, FromZero, Positive


@dataclass(frozen=True)
class ScopeConfig:
    """Which parameters train (docs/models.md). A critic always does."""

    kind: Literal["full", "lora", "layers", "random_half"] = "full"
    """full: all; lora: adapters beside linear layers; layers: those that `train` names;
    random_half: half of the matrices of each layer, drawn at random."""
    rank: FromOne = 16
    """lora: of each adapter."""
    alpha: Positive = 32.0
    """lora: an adapter counts alpha / rank times."""
    targets: tuple[str, ...] = ()
    """lora: patterns of linear layers, such as q_proj or layers.0.mlp; none: all of the
    decoder's."""
    dropout: Dropout = 0.0
    """lora: of an adapter's input while it trains; for methods without rollouts."""
    rslora: Flag = False
    """lora: alpha / sqrt(rank) in the place of alpha / rank."""
    train: tuple[str, ...] = ()
    """layers: ranges of decoder layers, such as 20-27, and patterns of parameters, such as norm or
    lm_head."""
    every: FromZero = 0
    """random_half: steps until another half is drawn; 0: one draw for the run."""
    export: Literal["merged", "adapter"] = "merged"
    """lora: what checkpoints and the saved model hold for use: the whole model with the adapters
    added, or the adapters alone in peft's format."""
