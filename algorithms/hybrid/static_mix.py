"""Static mix: RL and SFT losses in fixed proportion, the simplest hybrid and a control for every
schedule.

    L = (1 - mu) L_GRPO + mu L_SFT,    mu constant

Source: the ablation of CHORD, arXiv 2508.11408, where mu in {0.02, 0.1, 0.5} did no better than RL
alone; default 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.hybrid.chord_mu import ChordMu
from tandem.algorithms.parts.schedules import Schedule


@dataclass
class StaticMix(ChordMu):
    title: ClassVar[str] = "(1 - mu) GRPO + mu SFT with a constant mu"

    mu: Schedule = Schedule(peak=0.1)
