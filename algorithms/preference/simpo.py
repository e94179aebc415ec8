"""SimPO: prefer the answer with the higher log-prob per token, by a margin. No reference.

    L = mean over pairs of -log s(beta (M_w - M_l) - gamma),    M the mean of log p_t of a response

Source: arXiv 2405.14734 and the authors' code, from memory. beta 2.0 and gamma = 0.25 beta are the
code's defaults; the paper's runs have beta 2 to 2.5 and gamma 0.3 to 1.6, each tuned, learning
rates 3e-7 to 1e-6. Pairs as in DPO. No `demos`: there is no likelihood term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tandem.algorithms.parts.objectives.preference import SimplePreference
from tandem.algorithms.preference_method import PreferenceMethod, check_positive


@dataclass
class SimPO(PreferenceMethod):
    title: ClassVar[str] = "pairs: the chosen answer is likelier per token, by a margin"
    paper: ClassVar[str] = "2405.14734"

    beta: float = 2.0
    gamma: float = 0.5

    def __post_init__(self):
        check_positive(beta=self.beta)

    def objective(self):
        return SimplePreference(self.beta, self.gamma)
