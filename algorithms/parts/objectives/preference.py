"""Objectives that prefer one answer to another, or judge single ones. S is the log-prob of a
response, M the same per token, w the chosen and l the rejected answer of a pair, s the logistic
function:

    DirectPreference      -log s(beta h), (h - 1/(2 beta))^2 or max(0, 1 - beta h),
                          h = (S_w - S_w^ref) - (S_l - S_l^ref)
    SimplePreference      -log s(beta (M_w - M_l) - gamma)
    OddsRatio             -M_w - lam log s(o_w - o_l),    o = log(P/(1 - P)), P = exp(M)
    AbsoluteLikelihood    -M_w - lam (log s(o_w) + log s(-o_l))
    ProspectValue         a_y (1 - s(+-beta (S - S^ref - z0)))
    ImplicitReward        (s(beta (S - S^ref)) - target)^2
    AboveOthers           -log s(M - r)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tandem.algorithms.parts.objectives.units import Groups, Units
from tandem.algorithms.parts.pairs import CHOSEN, REJECTED

REFERENCE = frozenset({"ref_logp"})
NEARLY_ONE = -1e-6  # log of the largest probability whose odds are still told apart


def gain(units: Units, per_token: bool = False) -> Tensor:
    """[m]: how much likelier each response is than under the reference."""
    if per_token:
        return units.mean_logp - units.mean("ref_logp")
    return units.sum_logp - units.sum("ref_logp")


def compared(better: Tensor, worse: Tensor) -> dict[str, Tensor]:
    """What is reported of pairs: both sides, and how often the chosen one is ahead; a tie
    counts half."""
    better, worse = better.detach(), worse.detach()
    tie = (better == worse).float()
    accuracy = (better > worse).float() + 0.5 * tie
    return {"chosen": better, "rejected": worse, "margin": better - worse, "accuracy": accuracy}


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(P/(1 - P)) from log P < 0."""
    below = mean_logp.clamp(max=NEARLY_ONE)
    return below - (-torch.expm1(below)).log()


@dataclass(frozen=True)
class DirectPreference:
    needs: ClassVar[frozenset[str]] = REFERENCE

    loss: str = "sigmoid"  # sigmoid | ipo | hinge
    beta: float = 0.1
    label_smoothing: float = 0.0  # of sigmoid: the share of pairs that are the wrong way round
    per_token: bool = False  # M in the place of S

    def __call__(self, groups: Groups):
        better = gain(groups.of(CHOSEN), self.per_token)
        worse = gain(groups.of(REJECTED), self.per_token)
        metrics = compared(self.beta * better, self.beta * worse)
        return self.of_difference(better - worse), metrics

    def of_difference(self, h: Tensor) -> Tensor:
        if self.loss == "ipo":
            return (h - 1 / (2 * self.beta)) ** 2
        if self.loss == "hinge":
            return (1 - self.beta * h).clamp(min=0)
        wrong = self.label_smoothing
        return -(1 - wrong) * logsigmoid(self.beta * h) - wrong * logsigmoid(-self.beta * h)


@dataclass(frozen=True)
class SimplePreference:
    needs: ClassVar[frozenset[str]] = frozenset()

    beta: float = 2.0
    gamma: float = 0.5

    def __call__(self, groups: Groups):
        better = self.beta * groups.of(CHOSEN).mean_logp
        worse = self.beta * groups.of(REJECTED).mean_logp
        return -logsigmoid(better - worse - self.gamma), compared(better, worse)


@dataclass(frozen=True)
class OddsRatio:
    needs: ClassVar[frozenset[str]] = frozenset()

    lam: float = 0.1

    def __call__(self, groups: Groups):
        chosen, rejected = groups.of(CHOSEN).mean_logp, groups.of(REJECTED).mean_logp
        ratio = log_odds(chosen) - log_odds(rejected)
        return -chosen - self.lam * logsigmoid(ratio), compared(chosen, rejected)


@dataclass(frozen=True)
class AbsoluteLikelihood:
    needs: ClassVar[frozenset[str]] = frozenset()

    lam: float = 0.1

    def __call__(self, groups: Groups):
        chosen, rejected = groups.of(CHOSEN).mean_logp, groups.of(REJECTED).mean_logp
        judged = logsigmoid(log_odds(chosen)) + logsigmoid(-log_odds(rejected))
        return -chosen - self.lam * judged, compared(chosen, rejected)


@dataclass(frozen=True)
class ProspectValue:
    """Rows have the role of a good or a bad answer, and a stream `z0`."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"z0"}

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def __call__(self, units: Units):
        good = units.has_role(CHOSEN)
        sign = torch.where(good, 1.0, -1.0)
        weight = torch.where(good, self.desirable, self.undesirable)
        reward = self.beta * gain(units)
        z0 = self.beta * units["z0"]
        loss = weight * (1 - torch.sigmoid(sign * (reward - z0)))
        return loss, {
            "reward": reward.detach(),
            "signed_reward": (sign * reward).detach(),
            "z0": z0,
        }


@dataclass(frozen=True)
class ImplicitReward:
    """Rows have a stream `target_reward` from 0 to 1."""

    needs: ClassVar[frozenset[str]] = REFERENCE | {"target_reward"}

    beta: float = 0.01

    def __call__(self, units: Units):
        reward = torch.sigmoid(self.beta * gain(units))
        return (reward - units["target_reward"]) ** 2, {"reward": reward.detach()}


@dataclass(frozen=True)
class AboveOthers:
    """Rows have a stream `aligned`, r: what other models give the response per token."""

    needs: ClassVar[frozenset[str]] = frozenset({"aligned"})

    def __call__(self, units: Units):
        ahead = units.mean_logp - units["aligned"]
        weight = torch.sigmoid(-ahead.detach())
        return -logsigmoid(ahead), {"weight": weight}
