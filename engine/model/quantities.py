"""Quantities of the full distribution over the vocabulary, computed from a chunk of it at a time.

`measure` in engine/model/measured_head.py asks for several of them in one pass: the logits of a
chunk of tokens are made once for all. A quantity is a frozen dataclass that names what it reads:
other models, whose log-probs then lie beside the policy's, and data, per-token tensors that the
caller hands over. With z the policy's final logits (after scale, cap and temperature), p = softmax
z the policy and q another model or teacher, which gets no gradient:

    log-probs at ids      log p(i)                         dz = onehot(i) - p
    entropy               H = -sum p log p                 dz = -p (log p + H)
    forward KL, beta 0    KL(q || p) = sum q log(q / p)    dz = p - q
    reverse KL, beta 1    KL(p || q) = sum p log(p / q)    dz = p (log(p / q) - KL)
    JSD_beta              beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p
                                                           dz = (1 - beta) p (log(p / m) - KL(p||m))

`beta` is the teacher's share of the mixture, as in the codes of GKD (arXiv 2306.13649). At its ends
JSD_beta itself is 0; as in those codes 0 stands for the forward and 1 for the reverse KL. They are
the limits of JSD_beta / beta and of JSD_beta / (1 - beta), so that the loss jumps there.

Top-k with a tail: the teacher is known at k ids only; the rest of the vocabulary is one more event
on both sides. That is the exact divergence of k + 1 events: never negative, at most that of the
whole vocabulary, and with the teacher as a stationary point, which truncated sums do not have.

Cost in tensors of [chunk, vocabulary] that live at the same time (measured, docs/performance.md): 2
in the plain head, 3 for log-probs at ids and a top-k, 4 for the entropy, 5 for the forward KL, 6
for the reverse KL, 7 for a JSD; several in one pass take the largest of theirs and one more.
Another model costs one more matmul per token forward and, but for the last chunk, one in backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from typing import Protocol

import torch
from torch.nn.functional import pad

from tandem.engine.core.errors import MethodError

TAIL_FLOOR = 1e-7  # the least probability that the tail of a top-k is given, on both sides


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens in a row and all that is known of them; not to be overwritten."""

    log_p: torch.Tensor  # [c, V] log-probs of the policy
    lse: torch.Tensor  # [c, 1] log-sum-exp of its logits
    # model -> log-probs [c, C] over the C ids that it shares with the policy
    others: Mapping[str, torch.Tensor]
    data: Mapping[str, torch.Tensor]  # name -> [c] or [c, k]

    def beside(self, model: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p, log q) over the ids that the policy shares with `model`, both [c, C]."""
        log_q = self.others[model]
        common = log_q.shape[-1]
        if common == self.log_p.shape[-1]:
            return self.log_p, log_q
        return self.log_p[:, :common].log_softmax(-1), log_q


class Quantity(Protocol):
    """One number per token, or k of them. Equal quantities give equal results."""

    @property
    def models(self) -> tuple[str, ...]:
        """The other models whose log-probs it reads."""
        ...

    @property
    def data(self) -> tuple[str, ...]:
        """The per-token tensors that it reads."""
        ...

    def value(self, chunk: Chunk) -> torch.Tensor:
        """[c] or [c, k]"""
        ...

    def slope(self, chunk: Chunk, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """d sum(grad * value) / dz [c, V], a fresh tensor.

        `value` is what `value` gave, `grad` has its shape.
        """
        ...


@dataclass(frozen=True)
class LogProbs:
    """log p at given ids: `ids` names an int64 tensor [n] or [n, k], the result has its shape.

    Ids may repeat within a row; on a GPU their gradients are then added in no fixed order.
    """

    ids: str
    models: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, ...]:
        return (self.ids,)

    def value(self, chunk: Chunk) -> torch.Tensor:
        ids = chunk.data[self.ids]
        return chunk.log_p.gather(-1, columns(ids)).view(ids.shape)

    def slope(self, chunk: Chunk, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        ids, grad = columns(chunk.data[self.ids]), columns(grad)
        slope = chunk.log_p.exp().mul_(-grad.sum(-1, keepdim=True))
        return slope.scatter_add_(-1, ids, grad)


@dataclass(frozen=True)
class Entropy:
    """The entropy of the policy, in nats."""

    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()

    def value(self, chunk: Chunk) -> torch.Tensor:
        return -(chunk.log_p.exp().mul_(chunk.log_p)).sum(-1)

    def slope(self, chunk: Chunk, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        slope = (chunk.log_p + value[:, None]).mul_(-grad[:, None])
        return slope.mul_(chunk.log_p.exp())


@dataclass(frozen=True)
class Divergence:
    """A divergence between the policy and the other model `model` over all ids that they share.

    beta 0: forward KL(model || policy). beta 1: reverse KL(policy || model). Between: JSD_beta.
    """

    model: str
    beta: float
    data: tuple[str, ...] = ()

    def __post_init__(self):
        check_beta(self.beta)

    @property
    def models(self) -> tuple[str, ...]:
        return (self.model,)

    def value(self, chunk: Chunk) -> torch.Tensor:
        return divergence(*chunk.beside(self.model), self.beta)

    def slope(self, chunk: Chunk, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        slope = divergence_slope(*chunk.beside(self.model), self.beta).mul_(grad[:, None])
        rest = chunk.log_p.shape[-1] - slope.shape[-1]  # ids that are not common
        return pad(slope, (0, rest)) if rest else slope


@dataclass(frozen=True)
class TopKDivergence:
    """A divergence between the policy and a teacher that is known at k ids, over k + 1 events.

    `ids` names an int64 tensor [n, k] whose ids differ within a row, `logp` a float tensor [n, k]
    with the teacher's log-probs there, which must be finite. `beta` as in Divergence.
    """

    ids: str
    logp: str
    beta: float
    models: tuple[str, ...] = ()

    def __post_init__(self):
        check_beta(self.beta)

    @property
    def data(self) -> tuple[str, ...]:
        return (self.ids, self.logp)

    def events(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """(log p, log q) of the events, both [c, k + 1]; the tail comes last."""
        log_p = chunk.log_p.gather(-1, chunk.data[self.ids])
        return with_tail(log_p), with_tail(chunk.data[self.logp].to(log_p.dtype))

    def value(self, chunk: Chunk) -> torch.Tensor:
        return divergence(*self.events(chunk), self.beta)

    def slope(self, chunk: Chunk, value: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        log_p, log_q = self.events(chunk)
        # with respect to the logits of the k ids and the log-sum-exp of those of the tail
        events = divergence_slope(log_p, log_q, self.beta).mul_(grad[:, None])
        # an id of the tail has its share p / p(tail) in that log-sum-exp
        tail = (chunk.log_p - log_p[:, -1:]).exp_().mul_(events[:, -1:])
        return tail.scatter_(-1, chunk.data[self.ids], events[:, :-1])


def columns(tensor: torch.Tensor) -> torch.Tensor:
    """[c] -> [c, 1]; [c, k] as it is."""
    return tensor[:, None] if tensor.dim() == 1 else tensor


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise MethodError(
            f"the divergence's beta is {beta}, expected a number from 0 (forward KL) to 1 "
            "(reverse KL)"
        )


def with_tail(log_p: torch.Tensor) -> torch.Tensor:
    """Log-probs [c, k] of some ids -> [c, k + 1], the last one that of all other ids."""
    inside = log_p.logsumexp(-1, keepdim=True).clamp(max=-TAIL_FLOOR)
    return torch.cat([log_p, inside.expm1().neg_().log_()], -1)


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """KL(a || b) over the last dimension."""
    return log_a.exp().mul_(log_a - log_b).sum(-1)


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """Of log-probs [c, C] of policy and teacher: [c]. `beta` as in Divergence."""
    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = mixture(log_p, log_q, beta)
    return kl(log_q, log_m).mul_(beta).add_(kl(log_p, log_m), alpha=1 - beta)


def divergence_slope(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """d divergence / dz [c, C] for log p = log_softmax z; a fresh tensor."""
    p = log_p.exp()
    if beta == 0:
        return p.sub_(log_q.exp())
    if beta == 1:
        return centred(p, log_p - log_q)
    return centred(p, (log_p - mixture(log_p, log_q, beta)).mul_(1 - beta))


def centred(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """p (x - E_p x), in the place of p; x is overwritten."""
    mean = (p * x).sum(-1, keepdim=True)
    return p.mul_(x.sub_(mean))


def mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    """log(beta q + (1 - beta) p)"""
    return torch.logaddexp(log_q + log(beta), log_p + log(1 - beta))
