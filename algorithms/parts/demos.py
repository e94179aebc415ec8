"""The SFT half of a method: which objective demonstrations are trained with, how it is averaged,
and an entropy bonus on their tokens.

    L_SFT = RED{ w(p) objective(token) } - entropy_bonus RED{ h_t }

`demos:` in a config is an objective's name, or a mapping of the fields below. Every method with an
SFT term takes the same options; how it weighs against the RL half is the method's own (mu,
coefficient, ...), and where demonstrations have steps of their own a coefficient would only scale
the learning rate. w is the method's token weight, 1 but for CHORD (`token_weight`).

objective      source               on a token of a demonstration
nll                                 -log p, times 1 (SFT), p or p (1 - p) by `weight`
dft            arXiv 2508.05629     -sg[p] log p
power          Beyond Log           (1 - p^alpha)/alpha
thresholded      Likelihood         the same where p is at least, or at most, a threshold
iw_sft         iw-SFT               -sg[clip(pi/pi_ref)] log p, by sequence or token
talr           TALR                 -sg[max(p^(1/tau), floor)] log p
cleaned        Token Cleaning       -log p, of each row the tokens that improved most
proximal       arXiv 2508.17784     -min(r, clip(r)), r = pi/pi_old, for several updates per batch
entropy_nll    arXiv 2506.19767     -sg[scale exp(sign H)] log p (SRFT)
anchored       Anchored SFT         -sg[p] log p + coefficient KL(pi_ref || pi), full vocabulary
distilled      arXiv 2306.13649     a divergence to a teacher - nll log p, full vocabulary
one_token      One-Token Rollout    a policy gradient over tokens drawn at every position

What an objective costs beyond a forward and backward pass: iw_sft a forward of the frozen
reference, thresholded and talr one of the present policy before the update, cleaned both, anchored
and distilled the logits of the reference or a teacher beside the policy's, one_token what it takes
to draw from these.

An objective of the list is as in algorithms/parts/objectives/tokens.py, with four additions:
`needs` and `quantities` are those of its term, `brings(tokens, rng)` makes streams of the rows, by
a generator of the row's own, and `weigh(rows)` makes of what is known before the update a
factor per token, which becomes part of the rows' weights: a token with factor 0 is not counted.
That is how an objective depends on a whole step and still not on its packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.checks.rows import has_tokens
from tandem.algorithms.parts.objectives.anchored import Anchored
from tandem.algorithms.parts.objectives.cleaned import Cleaned
from tandem.algorithms.parts.objectives.distilled import Distilled
from tandem.algorithms.parts.objectives.entropy import EntropyBonus
from tandem.algorithms.parts.objectives.importance import ImportanceWeighted
from tandem.algorithms.parts.objectives.likelihood import DFT, Power, Thresholded
from tandem.algorithms.parts.objectives.nll import NLL, EntropyWeightedNLL, Weighted
from tandem.algorithms.parts.objectives.one_token import OneTokenRollout
from tandem.algorithms.parts.objectives.proximal import ClippedRatio
from tandem.algorithms.parts.objectives.talr import TALR
from tandem.algorithms.parts.objectives.tokens import Before
from tandem.algorithms.parts.reductions import NAMES, Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.algorithms.rows import expert_row
from tandem.engine.config.names import split_view
from tandem.engine.config.options import build
from tandem.engine.core.text import closest
from tandem.engine.core.types import Row, Trajectory

OBJECTIVES = {
    "nll": NLL,
    "dft": DFT,
    "power": Power,
    "thresholded": Thresholded,
    "iw_sft": ImportanceWeighted,
    "talr": TALR,
    "cleaned": Cleaned,
    "proximal": ClippedRatio,
    "entropy_nll": EntropyWeightedNLL,
    "anchored": Anchored,
    "distilled": Distilled,
    "one_token": OneTokenRollout,
}
NONE = Schedule()


@dataclass(frozen=True)
class DemoLoss:
    """Options of the SFT half."""

    objective: str = "nll"
    options: dict = field(default_factory=dict)  # of the objective
    reduction: str | None = None  # None: the method's own
    reduction_length: int | None = None
    entropy_bonus: Schedule | None = None  # None: the method's own, mostly none

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"method.demos.objective is {self.objective!r}"
                f"{closest(self.objective, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}"
            )
        if self.reduction is not None and self.reduction not in NAMES:
            raise ValueError(
                f"method.demos.reduction is {self.reduction!r}{closest(self.reduction, NAMES)}; "
                f"known: {', '.join(NAMES)}"
            )
        self.token_objective()  # these fail here, not in step 1
        self.reduce(Reduction())

    @property
    def compares_with(self) -> tuple[str, ...]:
        """Names of the models that the objective's quantities read."""
        found: set[str] = set()
        for quantity in getattr(self.token_objective(), "quantities", {}).values():
            found |= {split_view(model)[0] for model in quantity.models}
        return tuple(sorted(found))

    @classmethod
    def parse(cls, value: Any, key: str = "method.demos") -> DemoLoss:
        """An objective's name, a mapping of options, or a DemoLoss, which is taken as it is.

        Raises ValueError that names the key of the config.
        """
        if isinstance(value, str):
            value = {"objective": value}
        if not isinstance(value, (cls, Mapping)):
            raise ValueError(f"{key}: found {value!r}, expected a section or text")
        return build(cls, value, key)

    def token_objective(self) -> Any:
        owner = f"method.demos: objective {self.objective!r}"
        return build(OBJECTIVES[self.objective], self.options, "method.demos.options", owner)

    def reduce(self, default: Reduction) -> Reduction:
        """The reduction of the options, or the method's own."""
        if self.reduction is not None:
            return Reduction(self.reduction, self.reduction_length)
        if self.reduction_length is not None:
            raise ValueError(
                f"method.demos.reduction_length is {self.reduction_length}, but reduction is not "
                "given; it goes with sum_over_constant and constant"
            )
        return default

    def bonus(self, default: Schedule) -> Schedule:
        return default if self.entropy_bonus is None else self.entropy_bonus

    def row(self, trajectory: Trajectory, term: str, bonus: Schedule = NONE) -> Row:
        """A demonstration as a row of `term`, over the method's own `bonus`."""
        return self.with_bonus(expert_row(trajectory, term), term, bonus)

    def with_bonus(self, row: Row, term: str, bonus: Schedule = NONE) -> Row:
        """The row with its tokens of `term` in the entropy bonus too, if there is one."""
        if self.bonus(bonus).off:
            return row
        return row.with_term(f"{term}_entropy", row.weights[term].copy())

    def terms(
        self,
        term: str,
        batch: Batch,
        coefficient: float = 1.0,
        reduction: Reduction = Reduction(),
        weight: str = "one",
        bonus: Schedule = NONE,
    ) -> list[Term]:
        """The terms of the SFT half, over the method's own `reduction` and `bonus`."""
        objective = self.token_objective()
        needs = getattr(objective, "needs", frozenset())
        quantities = getattr(objective, "quantities", {})
        if hasattr(objective, "weigh"):
            needs = needs | {"old_logp"}
        if weight != "one":
            objective = Weighted(objective, weight)
        reduction = self.reduce(reduction)
        terms = [Term(term, objective, reduction, coefficient, needs=needs, quantities=quantities)]
        bonus = self.bonus(bonus)
        if not bonus.off:
            alpha = coefficient * bonus(batch.step, batch.signals)
            needs = frozenset({"entropy"})
            terms.append(Term(f"{term}_entropy", EntropyBonus(), reduction, alpha, needs=needs))
        return terms

    def credit(self, rows: Sequence[Row], term: str, batch: Batch) -> Sequence[Row]:
        """The rows of `term` with what the objective asks for beyond their tokens: streams of its
        own, and as weights what it makes of their log-probs before the update.
        """
        objective = self.token_objective()
        chosen = [i for i, row in enumerate(rows) if has_tokens(row, term)]
        rows = list(rows)
        if hasattr(objective, "brings"):
            for i in chosen:
                rng = np.random.default_rng([batch.budget.seed, batch.step, i])
                streams = objective.brings(len(rows[i].tokens), rng)
                rows[i] = rows[i].with_streams(**streams)
        if not hasattr(objective, "weigh") or not chosen:
            return rows
        masks = [np.flatnonzero(rows[i].weights[term]) for i in chosen]
        before = [known_before(rows[i], mask) for i, mask in zip(chosen, masks, strict=True)]
        factors = objective.weigh(before)
        for i, mask, factor in zip(chosen, masks, factors, strict=True):
            weight = rows[i].weights[term].copy()
            weight[mask] *= factor
            rows[i] = rows[i].with_term(term, weight)
        return rows


def known_before(row: Row, mask: np.ndarray) -> Before:
    """Of the row's tokens `mask`, int [n]."""
    ref_logp = row.streams.get("ref_logp")
    if ref_logp is not None:
        ref_logp = ref_logp[mask]
    return Before(row.streams["old_logp"][mask], ref_logp)
