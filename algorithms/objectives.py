"""Token objectives: pure functions from what is known about the trained tokens of a micro-batch to a loss per token.

An objective is a frozen dataclass (its fields are its constants) with `__call__(tokens: Tokens) -> (loss [n], {metric: [n]})`. What it reports of m of
its tokens alone stands a level deeper, {part: {metric: [m]}}, and is averaged over those.
The loss must be differentiable in `tokens.logp`; everything else is data. `weight`, `reduction` and `coefficient` are not its business.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tandem.engine.types import Source

LOG_RATIO_LIMIT = 20.0   # log-ratios are clamped to +-20 before exp, as in verl: e^20 is already far outside any clip range


@dataclass(frozen=True)
class Tokens:
    """The trained tokens of one micro-batch, flat. Streams that no row has are None."""

    logp: torch.Tensor                          # float32 [n], requires grad
    segment: torch.Tensor                       # int64 [n] row number, 0-based: tokens of a row stand together
    group: torch.Tensor                         # int64 [n]
    source: torch.Tensor                        # int8 [n]
    advantage: torch.Tensor | None = None       # float32 [n]
    old_logp: torch.Tensor | None = None        # float32 [n]; None means: this forward is the first since the snapshot, so old == sg[logp]
    behaviour_logp: torch.Tensor | None = None  # float32 [n], NaN on tokens that no rollout engine sampled
    ref_logp: torch.Tensor | None = None        # float32 [n]
    entropy: torch.Tensor | None = None         # float32 [n]
    value: torch.Tensor | None = None           # float32 [n], requires grad: the critic's present value of the state in which the token was chosen
    old_value: torch.Tensor | None = None       # float32 [n] the same before the update
    returns: torch.Tensor | None = None         # float32 [n]
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)     # {name: float32 [n]} from a method's own forward

    @property
    def old(self) -> torch.Tensor:
        """log pi_old: the snapshot's log-prob where the plan has one, else the present one without gradient."""
        if self.old_logp is None:
            return self.logp.detach()
        return torch.where(torch.isnan(self.old_logp), self.logp.detach(), self.old_logp)

    def take(self, index: torch.Tensor) -> Tokens:
        """The same tokens, `index` (int64 [m]) of them."""
        pick = lambda x: None if x is None else {k: v[index] for k, v in x.items()} if isinstance(x, Mapping) else x[index]
        return Tokens(*(pick(getattr(self, f)) for f in self.__dataclass_fields__))


def clamped_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def segment_mean(values: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
    """[n] -> [n]: every token gets the mean over its row's tokens."""
    rows = int(segment.max()) + 1 if len(segment) else 0
    total = torch.zeros(rows, device=values.device).index_add_(0, segment, values)
    count = torch.zeros(rows, device=values.device).index_add_(0, segment, torch.ones_like(values))
    return (total / count.clamp(min=1.0))[segment]


@dataclass(frozen=True)
class NLL:
    """Negative log-likelihood times a detached function of p = exp(logp).

    weight  w(p)                    source
    one     1                       SFT
    p       p                       SFT-IS, CHORD's rejected variant (arXiv 2508.11408), also DFT (arXiv 2508.05629)
    phi     p (1 - p)               CHORD-phi, arXiv 2508.11408 sec. 4.2
    The weight carries no gradient: the paper's formula is silent, both public codes detach.
    """

    weight: str = "one"

    def __call__(self, tokens: Tokens):
        p = tokens.logp.detach().exp()
        w = {"one": torch.ones_like(p), "p": p, "phi": p * (1.0 - p)}[self.weight]
        return -w * tokens.logp, {"p": p}


@dataclass(frozen=True)
class PPOClip:
    """max(-A rho, -A clamp(rho, 1 - clip_low, 1 + clip_high)) with rho = pi/pi_old, PPO eq. 7 (arXiv 1707.06347).

    dual_clip c > 1 bounds the loss of tokens with A < 0 by -A c (arXiv 1912.09729). None switches it off.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None

    def __call__(self, tokens: Tokens):
        rho = clamped_exp(tokens.logp - tokens.old)
        a = tokens.advantage
        loss = torch.maximum(-a * rho, -a * rho.clamp(1.0 - self.clip_low, 1.0 + self.clip_high))
        if self.dual_clip is not None:
            loss = torch.where(a < 0, torch.minimum(-a * self.dual_clip, loss), loss)
        clipped = ((a > 0) & (rho > 1.0 + self.clip_high)) | ((a < 0) & (rho < 1.0 - self.clip_low))
        return loss, {"clip_fraction": clipped.float(), "ppo_kl": (tokens.old - tokens.logp).detach()}


@dataclass(frozen=True)
class GSPO:
    """PPO's clip on the sequence ratio s_i = exp(mean_t (log pi - log pi_old)), GSPO arXiv 2507.18071 eq. 5-7.

    Written per token as sg[s_i] pi/sg[pi], the paper's token form (eq. 14-15), whose gradient with equal advantages is that of the sequence form.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __call__(self, tokens: Tokens):
        ratio = clamped_exp(segment_mean((tokens.logp - tokens.old).detach(), tokens.segment))
        rho = ratio * clamped_exp(tokens.logp - tokens.logp.detach())
        a = tokens.advantage
        loss = torch.maximum(-a * rho, -a * rho.clamp(1.0 - self.clip_low, 1.0 + self.clip_high))
        clipped = ((a > 0) & (rho > 1.0 + self.clip_high)) | ((a < 0) & (rho < 1.0 - self.clip_low))
        return loss, {"clip_fraction": clipped.float(), "ppo_kl": (tokens.old - tokens.logp).detach()}


@dataclass(frozen=True)
class CISPO:
    """-sg[clamp(rho, 1 - clip_low, 1 + clip_high)] A log pi: a token outside the range keeps a bounded gradient. MiniMax-M1, arXiv 2506.13585 eq. 4-5.

    Clamped on both sides as in verl; TRL clamps above only (`clip_low: 1.0` is that).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __call__(self, tokens: Tokens):
        rho = clamped_exp(tokens.logp - tokens.old).detach()
        clipped = (rho > 1.0 + self.clip_high) | (rho < 1.0 - self.clip_low)
        loss = -rho.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * tokens.advantage * tokens.logp
        return loss, {"clip_fraction": clipped.float(), "ppo_kl": (tokens.old - tokens.logp).detach()}


@dataclass(frozen=True)
class Reinforce:
    """-A log pi."""

    def __call__(self, tokens: Tokens):
        return -tokens.advantage * tokens.logp, {}


@dataclass(frozen=True)
class ExpertRatio:
    """-A f(p) on expert tokens whose behaviour probability is taken as 1, so that the ratio is p itself; no clip. The gradient goes through f.

    f(p) = p/(p + gamma)    LUFFY's shaping, arXiv 2504.14945 eq. 8: weight A gamma p/(p + gamma)^2 on grad log pi, largest at p = gamma
    f(p) = p                gamma None: plain importance sampling, weight A p
    """

    gamma: float | None = 0.1

    def __call__(self, tokens: Tokens):
        p = tokens.logp.exp()
        return -tokens.advantage * (p if self.gamma is None else p / (p + self.gamma)), {"p": p.detach()}


@dataclass(frozen=True)
class BySource:
    """One term, one denominator, two objectives: `expert` on expert tokens, `rollout` on all others. Metrics of either are named by it: expert/p."""

    rollout: object
    expert: object

    def __call__(self, tokens: Tokens):
        loss = torch.zeros_like(tokens.logp)
        is_expert, metrics = tokens.source == int(Source.EXPERT), {}
        for objective, name, chosen in ((self.rollout, "rollout", ~is_expert), (self.expert, "expert", is_expert)):
            index = chosen.nonzero().squeeze(-1)
            if len(index):
                part, metrics[name] = objective(tokens.take(index))
                loss = loss.index_add(0, index, part)
                metrics[f"{name}_share"] = chosen.float()
        return loss, metrics


@dataclass(frozen=True)
class EntropyWeightedNLL:
    """-sg[scale exp(sign H)] log p, H the mean token entropy of the row (level `sequence`) or the token's own (`token`). SRFT, arXiv 2506.19767 eq. 7."""

    scale: float = 0.5
    sign: float = -1.0
    level: str = "sequence"

    def __call__(self, tokens: Tokens):
        weight = entropy_weight(tokens, self.scale, self.sign, self.level)
        return -weight * tokens.logp, {"weight": weight}


@dataclass(frozen=True)
class SelfReinforce:
    """-sg[scale exp(H)] log p on samples with A > 0, +log p on the others: no baseline, no clip. SRFT, arXiv 2506.19767 eq. 10."""

    scale: float = 0.1
    level: str = "sequence"

    def __call__(self, tokens: Tokens):
        weight = entropy_weight(tokens, self.scale, 1.0, self.level)
        right = tokens.advantage > 0
        return torch.where(right, -weight, torch.ones_like(weight)) * tokens.logp, {"weight": weight, "right": right.float()}


def entropy_weight(tokens: Tokens, scale: float, sign: float, level: str) -> torch.Tensor:
    h = tokens.entropy.detach()
    return scale * torch.exp(sign * (segment_mean(h, tokens.segment) if level == "sequence" else h))


@dataclass(frozen=True)
class PrefixSelected:
    """`objective`, but of each row's PREFIX tokens only the share `keep` with the highest entropy is pushed; the others count, with advantage 0.

    Prefix-RFT, arXiv 2507.01679: entropy-based clipping. ceil(keep * tokens) per row, so that the choice does not depend on the micro-batch.
    """

    objective: object
    keep: float = 0.2

    def __call__(self, tokens: Tokens):
        prefix = tokens.source == int(Source.PREFIX)
        index = prefix.nonzero().squeeze(-1)
        advantage = tokens.advantage
        if len(index):
            segment = tokens.segment[index]
            order = index[torch.argsort(tokens.entropy[index], descending=True, stable=True)]
            order = order[torch.argsort(tokens.segment[order], stable=True)]        # by row, within a row by falling entropy
            count = torch.bincount(segment, minlength=int(segment.max()) + 1)
            start = torch.cumsum(count, 0) - count
            place = torch.arange(len(order), device=order.device) - start[tokens.segment[order]]
            dropped = order[place >= torch.ceil(self.keep * count - 1e-6)[tokens.segment[order]]]
            advantage = advantage.index_fill(0, dropped, 0.0)
        loss, metrics = self.objective(replace(tokens, advantage=advantage))
        return loss, {**metrics, "prefix_share": prefix.float()}


@dataclass(frozen=True)
class EntropyBonus:
    """-h_t, differentiable in the full distribution: a positive coefficient rewards entropy."""

    def __call__(self, tokens: Tokens):
        return -tokens.entropy, {}


@dataclass(frozen=True)
class KLToReference:
    """k3 estimator exp(d) - d - 1 with d = log pi_ref - log pi, d clamped to +-10. GRPO eq. 4 (arXiv 2402.03300)."""

    def __call__(self, tokens: Tokens):
        d = (tokens.ref_logp - tokens.logp).clamp(-10.0, 10.0)
        k3 = d.exp() - d - 1.0
        return k3, {"kl": k3.detach()}


@dataclass(frozen=True)
class RolloutCorrection:
    """Truncated importance sampling between learner snapshot and rollout engine: w = exp(log pi_old - log pi_rollout), no gradient.

    It multiplies the loss outside the clip, on tokens that a rollout engine sampled; all others keep weight 1.
    level     token: w_t;  sequence: the product of w_t over the row's sampled tokens
    mode      truncate: min(w, cap) (TIS, default cap 2 as in verl);  mask: w where floor <= w <= cap, else 0; floor None is 1/cap. IcePop: 0.5 and 5
    """

    level: str = "token"
    mode: str = "truncate"
    cap: float = 2.0
    floor: float | None = None

    def __call__(self, tokens: Tokens) -> torch.Tensor:
        sampled = ~torch.isnan(tokens.behaviour_logp)
        log_w = torch.nan_to_num(tokens.old.detach() - tokens.behaviour_logp, nan=0.0)
        if self.level == "sequence":
            rows = int(tokens.segment.max()) + 1 if len(log_w) else 0
            log_w = torch.zeros(rows, device=log_w.device).index_add_(0, tokens.segment, log_w)[tokens.segment]
        w = clamped_exp(log_w)
        if self.mode == "truncate":
            w = w.clamp(max=self.cap)
        else:
            floor = 1.0 / self.cap if self.floor is None else self.floor
            w = torch.where((w >= floor) & (w <= self.cap), w, torch.zeros_like(w))
        return torch.where(sampled, w, torch.ones_like(w))
