"""ASFT, aligned SFT: as ORPO, with the likelihood of each answer judged for itself in the place of
their ratio. No reference. (Anchored SFT is another method: `demos: anchored`.)

    L = mean over pairs of -M_w - lam (log s(o_w) + log s(-o_l))
      =                    -(1 + lam) M_w - lam log(1 - P_l)
    M the mean of log p_t of a response,    o = log(P/(1 - P)),    P = exp(M)

Source: arXiv 2409.10571, row 21 of the catalogue; lam is 0.1, 0.2, 0.5 or 1 there. Not built: its
factor beta on the odds, and the two-stage form without the likelihood. Pairs as in DPO. No `demos`:
the likelihood of the chosen answers is part of the formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.parts.objectives.preference import AbsoluteLikelihood
from tandem.algorithms.preference_method import PreferenceMethod


@dataclass
class ASFT(PreferenceMethod):
    title: ClassVar[str] = "pairs: SFT on the chosen answer, the rejected one made unlikely"
    paper: ClassVar[str] = "2409.10571"

    lam: float = 0.1

    def objective(self):
        return AbsoluteLikelihood(self.lam)
