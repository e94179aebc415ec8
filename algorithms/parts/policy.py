"""The RL half of a method: which advantage, token objective, reduction and regularisers, and what
is done about rollouts that are off-policy.

    L = RED{ objective(rho_t, A_i) } + kl RED{ k3(pi || pi_ref) } - entropy_bonus RED{ h_t }

`policy:` in a config is a preset name, or a mapping of the fields below. Every hybrid takes the
same options, over defaults of its own; `preset: NAME` starts from that preset instead of the
method's defaults.

preset                  source              advantage               objective       reduction
grpo                    arXiv 2402.03300    (R - mean)/std          clip 0.2/0.2    token_mean; the
                        paper: kl 0.04, seq_mean_token_mean
dr_grpo                 arXiv 2503.20783    R - mean                clip 0.2/0.2
                        sum_over_constant, give `reduction_length` (the response limit)
dapo                    arXiv 2503.14476    (R - mean)/std          clip 0.2/0.28   token_mean;
                        groups without spread are redrawn
rloo                    arXiv 2402.14740    leave one out           reinforce
                        seq_mean_token_sum
reinforce_pp            arXiv 2501.03262    R whitened              clip 0.2/0.2    token_mean
reinforce_pp_baseline   arXiv 2501.03262    R - mean, whitened      clip 0.2/0.2    token_mean
gspo                    arXiv 2507.18071    (R - mean)/std          gspo
                        seq_mean_token_mean
cispo                   arXiv 2506.13585    (R - mean)/std          cispo           token_mean
ppo                     arXiv 1707.06347    gae                     clip 0.2/0.2    token_mean; a
                        value head, see algorithms/parts/critic.py
luffy_code              code of LUFFY,      R - mean                ppo, no clip    constant (sum /
                        reduction_length, not divided by rows); entropy bonus 0.001
                        ReLIFT and HPT                                              of the mean entropy of all tokens, not of their sum

That code adds up the losses of a GPU's micro-batches and averages over GPUs. So on G GPUs with K
micro-batches each (of one optimizer step), its sum over tokens weighs 1/G, and what is a token mean
there (entropy bonus, KL, the SFT loss of HPT and of RL with an SFT loss) weighs K: their ratio
depends on the machine. Here a term has one global denominator. To get the ratio of a published run,
say what it ran on: `code_gpus: G, code_micro_batches: K`. Micro-batches that hold no token of a
mean do not count for it; where they differ much (few demonstrations), the K of the SFT loss is
smaller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.advantages import ESTIMATORS
from tandem.algorithms.parts.critic import Critic
from tandem.algorithms.parts.objectives.correction import RolloutCorrection
from tandem.algorithms.parts.objectives.entropy import EntropyBonus, KLToReference
from tandem.algorithms.parts.objectives.policy import CISPO, GSPO, PPOClip, Reinforce
from tandem.algorithms.parts.reductions import Reduction
from tandem.algorithms.parts.schedules import Schedule
from tandem.engine.config.options import build, typed
from tandem.engine.core.text import closest
from tandem.engine.core.types import Finish, Row, ScoredGroup, Source, Trajectory

PRESETS: dict[str, dict] = {
    "grpo": {},
    "dr_grpo": {"advantage": "dr_grpo", "reduction": "sum_over_constant"},
    "dapo": {"clip_high": 0.28, "dynamic_sampling": True},
    "rloo": {"advantage": "rloo", "objective": "reinforce", "reduction": "seq_mean_token_sum"},
    "reinforce_pp": {"advantage": "reinforce_pp"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline"},
    "gspo": {
        "objective": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "reduction": "seq_mean_token_mean",
    },
    "cispo": {"objective": "cispo"},
    "ppo": {"advantage": "gae"},
    "luffy_code": {
        "advantage": "dr_grpo",
        "clip_low": math.inf,
        "clip_high": math.inf,
        "reduction": "constant",
        "entropy_bonus": 0.001,
        "regulariser_reduction": "token_mean",
    },
}
# sources whose tokens belong to the policy term, where a method puts them into a group
TRAINED = (Source.POLICY, Source.PREFIX, Source.EXPERT)

T = TypeVar("T")


@dataclass
class PolicyLoss:
    """Options of the RL half."""

    advantage: str = "grpo"  # algorithms/parts/advantages.py
    critic: Critic | dict | None = None  # options of advantage gae: algorithms/parts/critic.py
    objective: str = "ppo"  # ppo | gspo | cispo | reinforce
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: str = "token_mean"
    reduction_length: int | None = None
    regulariser_reduction: str | None = None  # of KL and entropy bonus; None: as the policy term
    code_gpus: int = 1  # G and K of the docstring, of reduction constant only
    code_micro_batches: int = 1
    kl: Schedule | float = 0.0  # beta; anything but 0 loads a frozen reference model
    entropy_bonus: Schedule | float = 0.0
    dynamic_sampling: bool = False  # redraw groups whose rewards are all equal (DAPO)
    # do not train on responses cut at max_tokens (DAPO's overlong filtering)
    mask_truncated: bool = False
    # auto (token TIS where rollouts may be stale) | none | token | sequence
    correction: str = "auto"
    correction_mode: str = "truncate"  # truncate (TIS) | mask (IcePop, MIS)
    correction_cap: float = 2.0
    # of mode mask; None: 1/cap. IcePop's band is floor 0.5, cap 5
    correction_floor: float | None = None

    def __post_init__(self):
        check("advantage", self.advantage, ESTIMATORS)
        check("objective", self.objective, ("ppo", "gspo", "cispo", "reinforce"))
        check("correction", self.correction, ("auto", "none", "token", "sequence"))
        check("correction_mode", self.correction_mode, ("truncate", "mask"))
        Reduction(self.reduction, self.reduction_length)  # fails here, not in step 1
        self.regulariser()
        for name in ("code_gpus", "code_micro_batches"):
            count = getattr(self, name)
            if count < 1 or (count > 1 and self.reduction != "constant"):
                raise ValueError(
                    f"method.policy.{name} is {count} with reduction {self.reduction!r}: it "
                    "is a count, at least 1, and more than 1 "
                    "goes with reduction constant only (preset luffy_code), whose authors' "
                    "code depends on it"
                )
        self.kl, self.entropy_bonus = Schedule.parse(self.kl), Schedule.parse(self.entropy_bonus)
        if self.critic is not None and self.advantage != "gae":
            raise ValueError(
                "method.policy.critic is given, but method.policy.advantage is "
                f"{self.advantage!r}, which has no critic; set it to gae (preset ppo)"
            )
        self.critic = (
            build(Critic, self.critic or {}, "method.policy.critic")
            if self.advantage == "gae"
            else None
        )

    @classmethod
    def parse(cls, value, **defaults) -> PolicyLoss:
        """A preset name, a mapping of options with an optional `preset`, or a PolicyLoss, which is
        taken as it is.

        `defaults` are the method's own; they may name a preset themselves. A preset that `value`
        names takes their place, single options change them.
        """
        if isinstance(value, cls):
            return value
        options = {"preset": value} if isinstance(value, str) else dict(value)
        if "preset" not in options:
            critic = {
                **(defaults.get("critic") or {}),
                **typed(dict, options.get("critic") or {}, "method.policy.critic"),
            }
            options = {**defaults, **options, "critic": critic or None}
        preset = typed(str, options.pop("preset", "grpo"), "method.policy.preset")
        check("preset", preset, PRESETS)
        return build(cls, {**PRESETS[preset], **options}, "method.policy")

    @property
    def uses_reference(self) -> bool:
        return not self.kl.off or (self.critic is not None and not self.critic.kl.off)

    def accept(self, group: ScoredGroup) -> bool:
        """False for a group that teaches nothing and is to be redrawn."""
        return not self.dynamic_sampling or bool(np.ptp(group.rewards) > 0)

    def advantages(self, groups: Sequence[ScoredGroup]) -> list[np.ndarray]:
        """float32 [n] per group, from the rewards of its trajectories."""
        lengths = [np.array([self.mask(t).sum() for t in g.trajectories]) for g in groups]
        return ESTIMATORS[self.advantage]([g.rewards for g in groups], lengths)

    def mask(self, trajectory: Trajectory) -> np.ndarray:
        """float32 [T]: 1 on the tokens of the policy term that are trained."""
        cut = self.mask_truncated and trajectory.finish == Finish.LENGTH
        return np.zeros(len(trajectory.tokens), np.float32) if cut else trained(trajectory)

    def row(self, trajectory: Trajectory, advantage: float) -> Row:
        """A row of the policy term.

        The regularisers that are on get the tokens the policy sampled itself: KL and entropy are
        expectations under it.
        """
        mask = self.mask(trajectory)
        sampled = mask * (trajectory.source == Source.POLICY)
        row = Row(
            tokens=trajectory.tokens,
            source=trajectory.source,
            weights={"policy": mask, **{name: sampled.copy() for name in self.regularisers()}},
            advantage=mask * np.float32(advantage),
            behaviour_logp=trajectory.behaviour_logp,
            version=trajectory.version,
            group=trajectory.group,
            prompt_id=trajectory.prompt_id,
        )
        return row if self.critic is None else self.critic.row(row, trajectory)

    def credit(self, rows: Sequence[Row], batch: Batch) -> Sequence[Row]:
        return rows if self.critic is None else self.critic.credit(rows, batch)

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Every trajectory of every group as a row, with the advantage that it has within its
        group.
        """
        return [
            self.row(t, a)
            for g, advantages in zip(groups, self.advantages(groups), strict=True)
            for t, a in zip(g.trajectories, advantages, strict=True)
        ]

    @property
    def mean_weight(self) -> int:
        """What a token mean weighs in the authors' code: K of the docstring."""
        return self.code_micro_batches

    def regulariser(self) -> Reduction:
        """The reduction of KL and entropy bonus."""
        if self.regulariser_reduction is None:
            return Reduction(self.reduction, self.reduction_length)
        length = self.reduction_length if self.regulariser_reduction.endswith("constant") else None
        return Reduction(self.regulariser_reduction, length)

    def regularisers(self) -> list[str]:
        return [
            name
            for name, coefficient in (("kl", self.kl), ("entropy", self.entropy_bonus))
            if not coefficient.off
        ]

    def token_objective(self):
        if self.objective == "ppo":
            return PPOClip(self.clip_low, self.clip_high, self.dual_clip)
        return {
            "gspo": GSPO(self.clip_low, self.clip_high),
            "cispo": CISPO(self.clip_low, self.clip_high),
            "reinforce": Reinforce(),
        }[self.objective]

    def terms(self, batch: Batch, coefficient: float = 1.0) -> list[Term]:
        reduction = Reduction(self.reduction, self.reduction_length)
        level = (
            ("token" if batch.off_policy else "none")
            if self.correction == "auto"
            else self.correction
        )
        correction = (
            None
            if level == "none"
            else RolloutCorrection(
                level, self.correction_mode, self.correction_cap, self.correction_floor
            )
        )
        whole = coefficient / self.code_gpus
        terms = [Term("policy", self.token_objective(), reduction, whole, correction)]
        mean = self.regulariser()
        share = coefficient * self.mean_weight if mean.name == "token_mean" else whole
        if not self.kl.off:
            beta = share * self.kl(batch.step, batch.signals)
            terms.append(Term("kl", KLToReference(), mean, beta, needs=frozenset({"ref_logp"})))
        if not self.entropy_bonus.off:
            bonus = share * self.entropy_bonus(batch.step, batch.signals)
            terms.append(Term("entropy", EntropyBonus(), mean, bonus, needs=frozenset({"entropy"})))
        return terms + ([] if self.critic is None else self.critic.terms(reduction, whole))


def trained(trajectory: Trajectory) -> np.ndarray:
    """float32 [T]: 1 on the tokens of the policy term."""
    return np.isin(trajectory.source, TRAINED).astype(np.float32)


def variant(as_: str, paper: T, code: T) -> T:
    """What `as: paper | code` selects."""
    if as_ not in ("paper", "code"):
        raise ValueError(f"as is {as_!r}; known: paper, code")
    return paper if as_ == "paper" else code


def check(option: str, value, known) -> None:
    if value not in known:
        raise ValueError(
            f"method.policy.{option} is {value!r}{closest(value, known)}; known: {', '.join(known)}"
        )
