"""The RL half of a method: which advantage, token objective, reduction and regularisers, and what
is done about rollouts that are off-policy.

    L = RED{ objective(rho_t, A_i) } + kl RED{ k3(pi || pi_ref) } - entropy_bonus RED{ h_t }

`policy:` in a config is a preset name, or a mapping of the fields below. Every hybrid takes the
same options, over defaults of its own; `preset: NAME` starts from that preset instead of the
method's defaults.

preset                 source            advantage           objective     reduction
grpo                   arXiv 2402.03300  (R - mean)/std      clip 0.2/0.2  token_mean
dr_grpo                arXiv 2503.20783  R - mean            clip 0.2/0.2  sum_over_constant
dapo                   arXiv 2503.14476  (R - mean)/std      clip 0.2/0.28 token_mean
rloo                   arXiv 2402.14740  leave one out       reinforce     seq_mean_token_sum
reinforce_pp           arXiv 2501.03262  R whitened          clip 0.2/0.2  token_mean
reinforce_pp_baseline  arXiv 2501.03262  R - mean, whitened  clip 0.2/0.2  token_mean
gspo                   arXiv 2507.18071  (R - mean)/std      gspo          seq_mean_token_mean
cispo                  arXiv 2506.13585  (R - mean)/std      cispo         token_mean
ppo                    arXiv 1707.06347  gae                 clip 0.2/0.2  token_mean
luffy_code             code of LUFFY,    R - mean            no clip       constant
                       ReLIFT and HPT

grpo: the paper has kl 0.04 and seq_mean_token_mean. dr_grpo needs `reduction_length`, the response
limit; luffy_code too: it divides a sum by it, whatever the number of rows, and has an entropy bonus
of 0.001 on the mean entropy of all tokens, not on their sum. dapo redraws groups without spread.
ppo has a value head, see algorithms/parts/critic.py.

The code behind luffy_code adds up the losses of a GPU's micro-batches and averages over GPUs. So on
G GPUs with K micro-batches each (of one optimizer step), its sum over tokens weighs 1/G, and what
is a token mean there (entropy bonus, KL, the SFT loss of HPT and of RL with an SFT loss) weighs K:
their ratio depends on the machine. Here a term has one global denominator. To get the ratio of a
published run, say what it ran on: `code_gpus: G, code_micro_batches: K`. Micro-batches that hold no
token of a mean do not count for it; where they differ much (few demonstrations), the K of the SFT
loss is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tandem.algorithms.base import Batch, Term
from tandem.algorithms.parts.advantages import ESTIMATORS
from tandem.algorithms.parts.critic import Critic
from tandem.algorithms.parts.objectives.bounds import check_clip_range
from tandem.algorithms.parts.objectives.correction import RolloutCorrection
from tandem.algorithms.parts.objectives.entropy import EntropyBonus, KLToReference
from tandem.algorithms.parts.objectives.policy import CISPO, GSPO, PPOClip, Reinforce
from tandem.algorithms.parts.objectives.tokens import Objective
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


@dataclass
class PolicyLoss:
    """Options of the RL half."""

    advantage: str = "grpo"  # algorithms/parts/advantages.py
    critic: Critic | None = None  # of advantage gae; None: a Critic with its defaults
    objective: str = "ppo"  # ppo | gspo | cispo | reinforce
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    reduction: str = "token_mean"
    reduction_length: int | None = None
    regulariser_reduction: str | None = None  # of KL and entropy bonus; None: as the policy term
    code_gpus: int = 1  # G and K of the docstring, of reduction constant only
    code_micro_batches: int = 1
    kl: Schedule = Schedule()  # beta; anything but 0 loads a frozen reference model
    entropy_bonus: Schedule = Schedule()
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
        check_clip_range("method.policy", self.clip_low, self.clip_high)
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
        if self.critic is not None and self.advantage != "gae":
            raise ValueError(
                "method.policy.critic is given, but method.policy.advantage is "
                f"{self.advantage!r}, which has no critic; set it to gae (preset ppo)"
            )
        if self.critic is None and self.advantage == "gae":
            self.critic = Critic()

    @classmethod
    def parse(cls, value: Any, **defaults: Any) -> PolicyLoss:
        """A preset name, a mapping of options with an optional `preset`, or a PolicyLoss, which is
        taken as it is. `defaults` are the method's own; they may name a preset themselves.

        Raises ValueError that names the key of the config.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"preset": value}
        if not isinstance(value, Mapping):
            raise ValueError(f"method.policy: found {value!r}, expected a section or text")
        return build(cls, merged(value, defaults), "method.policy")

    @property
    def uses_reference(self) -> bool:
        return not self.kl.off or (self.critic is not None and not self.critic.kl.off)

    def accept(self, group: ScoredGroup) -> bool:
        """False for a group that teaches nothing and is to be redrawn."""
        return not self.dynamic_sampling or bool(np.ptp(group.rewards) > 0)

    def advantages(self, groups: Sequence[ScoredGroup]) -> list[np.ndarray]:
        """float32 [n] per group, from the rewards of its trajectories."""
        lengths = []
        for group in groups:
            lengths.append(np.array([self.mask(t).sum() for t in group.trajectories]))
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
        weights = {"policy": mask}
        for name in self.regularisers():
            weights[name] = sampled.copy()
        streams = {"behaviour_logp": trajectory.behaviour_logp}
        if self.critic is None:
            streams["advantage"] = mask * np.float32(advantage)
        row = Row(
            tokens=trajectory.tokens,
            source=trajectory.source,
            weights=weights,
            streams=streams,
            version=trajectory.version,
            group=trajectory.group,
            prompt_id=trajectory.prompt_id,
        )
        if self.critic is None:
            return row
        # with a critic, what `advantages` returns are the rewards themselves
        return self.critic.row(row, trajectory, advantage)

    def credit(self, rows: Sequence[Row], batch: Batch) -> Sequence[Row]:
        return rows if self.critic is None else self.critic.credit(rows, batch)

    def rows(self, groups: Sequence[ScoredGroup]) -> list[Row]:
        """Every trajectory of every group as a row, with the advantage that it has within its
        group.
        """
        rows = []
        for group, advantages in zip(groups, self.advantages(groups), strict=True):
            pairs = zip(group.trajectories, advantages, strict=True)
            rows += [self.row(trajectory, advantage) for trajectory, advantage in pairs]
        return rows

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
        coefficients = {"kl": self.kl, "entropy": self.entropy_bonus}
        return [name for name, coefficient in coefficients.items() if not coefficient.off]

    def token_objective(self) -> Objective:
        if self.objective == "ppo":
            return PPOClip(self.clip_low, self.clip_high, self.dual_clip)
        if self.objective == "gspo":
            return GSPO(self.clip_low, self.clip_high)
        if self.objective == "cispo":
            return CISPO(self.clip_low, self.clip_high)
        return Reinforce()

    def rollout_correction(self, off_policy: bool) -> RolloutCorrection | None:
        level = self.correction
        if level == "auto":
            level = "token" if off_policy else "none"
        if level == "none":
            return None
        mode, cap, floor = self.correction_mode, self.correction_cap, self.correction_floor
        return RolloutCorrection(level, mode, cap, floor)

    def terms(self, batch: Batch, coefficient: float = 1.0) -> list[Term]:
        reduction = Reduction(self.reduction, self.reduction_length)
        correction = self.rollout_correction(batch.off_policy)
        whole = coefficient / self.code_gpus
        terms = [Term("policy", self.token_objective(), reduction, whole, correction)]
        mean = self.regulariser()
        factor = coefficient * self.mean_weight if mean.name == "token_mean" else whole
        if not self.kl.off:
            beta = factor * self.kl(batch.step, batch.signals)
            terms.append(Term("kl", KLToReference(), mean, beta, needs=frozenset({"ref_logp"})))
        if not self.entropy_bonus.off:
            bonus = factor * self.entropy_bonus(batch.step, batch.signals)
            terms.append(Term("entropy", EntropyBonus(), mean, bonus, needs=frozenset({"entropy"})))
        if self.critic is not None:
            terms += self.critic.terms(reduction, whole)
        return terms


def merged(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a PolicyLoss, from what is nearest to the user:

    with a preset of the user's      options, the preset
    else                             options, the method's defaults, the preset that those name
                                     (the options of `critic` one by one in the same order)
    """
    if "preset" not in options:
        critic = typed(dict, options.get("critic") or {}, "method.policy.critic")
        critic = {**defaults.get("critic", {}), **critic}
        options = {**defaults, **options, "critic": critic or None}
    preset = typed(str, options.get("preset", "grpo"), "method.policy.preset")
    check("preset", preset, PRESETS)
    fields = {**PRESETS[preset], **options}
    fields.pop("preset", None)
    return fields


def trained(trajectory: Trajectory) -> np.ndarray:
    """float32 [T]: 1 on the tokens of the policy term."""
    return np.isin(trajectory.source, TRAINED).astype(np.float32)


def check(option: str, value, known) -> None:
    if value not in known:
        raise ValueError(
            f"method.policy.{option} is {value!r}{closest(value, known)}; known: {', '.join(known)}"
        )
