"""SFT with importance sampling, beside RL: an expert token weighs its probability p.

    L = (1 - mu) L_GRPO - mu TOK_demo{ sg[p_t] log p_t },    mu = 0.1 constant

Source: arXiv 2508.11408, the variant that CHORD's authors try and reject.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.algorithms.hybrid.chord_mu import ChordMu
from tandem.algorithms.parts.schedules import Schedule


@dataclass
class SFTIS(ChordMu):
    title: ClassVar[str] = (
        "SFT with importance sampling: CHORD's rejected variant, expert tokens weighted by p"
    )

    mu: Schedule = Schedule(peak=0.1)
    token_weight: Literal["one", "p", "phi"] = "p"
