"""DPO: prefer the chosen answer, by how much likelier than under the reference each one is.

    h  = (S_w - S_w^ref) - (S_l - S_l^ref),    S the sum of log p_t over a response
    L  = mean over pairs of
         sigmoid   -(1 - eps) log s(beta h) - eps log s(-beta h),    eps = label_smoothing
         ipo       (h - 1/(2 beta))^2
         hinge     max(0, 1 - beta h)

Source: arXiv 2305.18290, beta 0.1 as in its experiments; ipo arXiv 2310.12036, whose tau is beta;
hinge SLiC-HF (2305.10425) on DPO's h; label smoothing is cDPO, for pairs of which a share eps is
the wrong way round. Formulas from memory of the papers. Paper and code: TRL averages the log-probs
of a response in ipo, after a word of its authors; here `per_token: true` does that, in any loss.

The reference is the model that the run starts from. `pairs: data` reads a source with `chosen` and
`rejected`; `pairs: rollouts` takes the best and the worst of each group, and nothing of a group
whose rewards are all equal. No `demos`: the chosen answers have no likelihood term of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tandem.algorithms.parts.objectives.preference import DirectPreference
from tandem.algorithms.preference_method import PreferenceMethod, check_positive


@dataclass
class DPO(PreferenceMethod):
    title: ClassVar[str] = "pairs: the chosen answer gains on the reference more than the rejected"
    paper: ClassVar[str] = "2305.18290"

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    per_token: bool = False

    def __post_init__(self):
        check_positive(beta=self.beta)
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}, must be at least 0 and below 0.5"
            )
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(
                f"label_smoothing is {self.label_smoothing} with loss {self.loss!r}; it goes with "
                "sigmoid only"
            )

    def objective(self):
        return DirectPreference(self.loss, self.beta, self.label_smoothing, self.per_token)
