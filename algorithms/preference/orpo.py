"""ORPO: SFT on the chosen answers, and the odds of these against those of the rejected ones. One
stage, no reference.

    L = mean over pairs of -M_w - lam log s(o_w - o_l)
    M the mean of log p_t of a response,    o = log(P/(1 - P)),    P = exp(M)

Source: arXiv 2403.07691, from memory; lam 0.1. Paper and code: the likelihood is each answer's own
mean, as the formula has it; the code takes a token mean over a batch, prompts included. Pairs as in
DPO. No `demos`: the likelihood of the chosen answers is part of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.parts.objectives.preference import OddsRatio
from tandem.algorithms.preference_method import PreferenceMethod


@dataclass
class ORPO(PreferenceMethod):
    title: ClassVar[str] = "pairs: SFT on the chosen answer + its odds against the rejected one's"
    paper: ClassVar[str] = "2403.07691"

    lam: float = 0.1

    def objective(self):
        return OddsRatio(self.lam)
