"""iw-SFT: demonstrations weighted by how much likelier they are now than for the model at the
start.

    sequence    w_i = sg[ clip( exp( scale * mean_t (log pi - log pi_ref) ), 0, 16 ) ]
    token       w_t = sg[ clip( pi/pi_ref, 0.2, 1.8 ) ]
    L           = TOK_demo{ -w log p_t }
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.parts.objectives.tokens import Tokens, clamped_exp, segment_mean
from tandem.engine.core.text import closest

BOUNDS = {"sequence": (0.0, 16.0), "token": (0.2, 1.8)}


@dataclass(frozen=True)
class ImportanceWeighted:
    """-sg[w] log p; needs the frozen reference, the model at the start of the run.

    Source: "Supervised Fine Tuning on Curated Data is Reinforcement Learning", row 12 of the
    catalogue, and the authors' code; scale 1 as it is called there (the function's own default is
    2). Data filtered by reward is a lower bound of the RL objective, which the ratio tightens.
    Their recipe: learning rate 1e-5, 5 epochs, weight decay 1e-4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logp"})

    level: str = "sequence"
    scale: float = 1.0  # on the mean log-ratio of a sequence
    low: float | None = None  # None: 0 for a sequence, 0.2 for a token
    high: float | None = None  # None: 16 for a sequence, 1.8 for a token

    def __post_init__(self):
        if self.level not in BOUNDS:
            raise ValueError(
                f"objective iw_sft: level is {self.level!r}{closest(self.level, BOUNDS)}; known: "
                f"{', '.join(BOUNDS)}"
            )
        low, high = self.bounds()
        if not low <= high:
            raise ValueError(
                f"objective iw_sft: low is {low} and high is {high}; the weight is clipped to "
                "[low, high], so low must not be above high"
            )

    def bounds(self) -> tuple[float, float]:
        """What the weight is clipped to."""
        low, high = BOUNDS[self.level]
        if self.low is not None:
            low = self.low
        if self.high is not None:
            high = self.high
        return low, high

    def __call__(self, tokens: Tokens):
        ratio = tokens.logp.detach() - tokens["ref_logp"]
        if self.level == "sequence":
            ratio = self.scale * segment_mean(ratio, tokens.segment)
        low, high = self.bounds()
        weight = clamped_exp(ratio).clamp(low, high)
        return -weight * tokens.logp, {"weight": weight}
