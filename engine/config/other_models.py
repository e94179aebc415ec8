"""The section `models`: what the policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tandem.engine.config.kinds import PositiveShare


@dataclass(frozen=True)
class OtherModelConfig:
    """A model that the policy is compared with, such as a teacher. It is never trained."""

    kind: Literal["path", "ema", "initial", "policy"] = "path"
    """path: another model; ema: a moving average of the policy; initial: the weights that the run
    starts from; policy: the present weights."""
    path: str | None = None
    """Of kind path: Hugging Face folder or name, with the tokenizer of the model that is
    trained."""
    rate: PositiveShare = 0.05
    """Of kind ema: how far the average goes towards the policy after each optimizer step; 1 minus
    the decay."""
