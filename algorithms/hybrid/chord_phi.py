"""CHORD-phi: RL and SFT in fixed proportion, where an expert token weighs p(1 - p): least what the
model knows already, or would never say.

    L = (1 - mu) L_GRPO - mu TOK_demo{ sg[p_t (1 - p_t)] log p_t },    mu = 0.1 constant

Source: arXiv 2508.11408 sec. 4.2. phi carries no stop-gradient in the paper's formula, both public
codes detach it; so does this file. With `demos` phi is a factor on that objective.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.algorithms.hybrid.chord_mu import ChordMu
from tandem.algorithms.parts.schedules import Schedule


@dataclass
class ChordPhi(ChordMu):
    title: ClassVar[str] = "CHORD-phi: constant mu, expert tokens weighted by p(1 - p)"

    mu: Schedule = Schedule(peak=0.1)
    token_weight: Literal["one", "p", "phi"] = "phi"
