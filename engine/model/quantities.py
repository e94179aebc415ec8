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

Ids: rows bring them as floating-point streams of whole numbers, exact below 2^24; `whole_ids` makes
them integers. Rows bring one number per token, so top-k is for callers that hand over [n, k].

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
from torch import Tensor
from torch.nn.functional import pad

from tandem.engine.core.errors import MethodError
from tandem.engine.model.chunked_head import entropy_of

TAIL_FLOOR = 1e-7  # the least probability that the tail of a top-k is given, on both sides


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some tokens in a row and all that is known of them; not to be overwritten."""

    log_p: Tensor  # [c, V] log-probs of the policy
    lse: Tensor  # [c, 1] log-sum-exp of its logits
    # model -> log-probs [c, C] over the C ids that it shares with the policy
    others: Mapping[str, Tensor]
    data: Mapping[str, Tensor]  # name -> [c] or [c, k]

    def beside(self, model: str) -> tuple[Tensor, Tensor]:
        """(log p, log q) over the ids that the policy shares with `model`, both [c, C]."""
        log_p = self.log_p
        log_q = self.others[model]
        common = log_q.shape[-1]
        if common < log_p.shape[-1]:
            log_p = log_p[:, :common].log_softmax(-1)
        return log_p, log_q


class Quantity(Protocol):
    """One number per token, or k of them. Equal quantities give equal results."""

    @property
    def models(self) -> tuple[str, ...]:
        """The other models whose log-probs it reads, `NAME` or, behind a row's other prompt,
        `NAME@VIEW`."""
        ...

    @property
    def data(self) -> tuple[str, ...]:
        """The per-token tensors that it reads."""
        ...

    def value(self, chunk: Chunk) -> Tensor:
        """[c] or [c, k]"""
        ...

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        """d sum(grad * value) / dz [c, V], a fresh tensor.

        `value` is what `value` gave, `grad` has its shape.
        """
        ...


@dataclass(frozen=True)
class LogProbs:
    """log p at given ids: `ids` names an int64 tensor [n] or [n, k], the result has its shape. A
    stream of a row may be one: see `whole_ids`.

    Ids may repeat within a row; on a GPU their gradients are then added in no fixed order.
    """

    ids: str
    models: tuple[str, ...] = ()

    @property
    def data(self) -> tuple[str, ...]:
        return (self.ids,)

    def value(self, chunk: Chunk) -> Tensor:
        ids = chunk.data[self.ids]
        found = chunk.log_p.gather(-1, columns(ids))
        return found.view(ids.shape)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        ids = columns(chunk.data[self.ids])
        grad = columns(grad)
        total_grad = grad.sum(-1, keepdim=True)
        slope = chunk.log_p.exp()
        slope.mul_(-total_grad)
        slope.scatter_add_(-1, ids, grad)
        return slope


@dataclass(frozen=True)
class Entropy:
    """The entropy of the policy, in nats."""

    models: tuple[str, ...] = ()
    data: tuple[str, ...] = ()

    def value(self, chunk: Chunk) -> Tensor:
        return entropy_of(chunk.log_p)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        slope = chunk.log_p + value[:, None]
        slope.mul_(-grad[:, None])
        slope.mul_(chunk.log_p.exp())
        return slope


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

    def value(self, chunk: Chunk) -> Tensor:
        log_p, log_q = chunk.beside(self.model)
        return divergence(log_p, log_q, self.beta)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        log_p, log_q = chunk.beside(self.model)
        slope = divergence_slope(log_p, log_q, self.beta)
        slope.mul_(grad[:, None])
        not_common = chunk.log_p.shape[-1] - slope.shape[-1]
        if not_common == 0:
            return slope
        return pad(slope, (0, not_common))


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

    def events(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(log p, log q) of the events, both [c, k + 1]; the tail comes last."""
        ids = chunk.data[self.ids]
        log_p = chunk.log_p.gather(-1, ids)
        log_q = chunk.data[self.logp].to(log_p.dtype)
        return with_tail(log_p), with_tail(log_q)

    def value(self, chunk: Chunk) -> Tensor:
        log_p, log_q = self.events(chunk)
        return divergence(log_p, log_q, self.beta)

    def slope(self, chunk: Chunk, value: Tensor, grad: Tensor) -> Tensor:
        log_p, log_q = self.events(chunk)
        # with respect to the logits of the k ids and the log-sum-exp of those of the tail
        of_events = divergence_slope(log_p, log_q, self.beta)
        of_events.mul_(grad[:, None])
        # an id of the tail has its share p / p(tail) in that log-sum-exp
        slope = chunk.log_p - log_p[:, -1:]
        slope.exp_()
        slope.mul_(of_events[:, -1:])
        slope.scatter_(-1, chunk.data[self.ids], of_events[:, :-1])
        return slope


def whole_ids(name: str, ids: Tensor, vocabulary: int) -> Tensor:
    """Floating-point ids as int64, 0 where they are NaN: on tokens of rows that bring none, whose
    result nobody reads. Integers as they are.

    Raises MethodError for other numbers than those of the vocabulary.
    """
    if not ids.is_floating_point():
        return ids
    ids = torch.where(ids.isnan(), 0.0, ids)
    wrong = (ids < 0) | (ids >= vocabulary) | (ids != ids.floor())
    if bool(wrong.any()):
        raise MethodError(
            f"{name!r} is {ids[wrong][0].item()} at a token, expected token ids: whole numbers "
            f"from 0 to {vocabulary - 1}"
        )
    return ids.to(torch.int64)


def columns(tensor: Tensor) -> Tensor:
    """[c] -> [c, 1]; [c, k] as it is."""
    if tensor.dim() == 1:
        return tensor[:, None]
    return tensor


def check_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise MethodError(
            f"the divergence's beta is {beta}, expected a number from 0 (forward KL) to 1 "
            "(reverse KL)"
        )


def with_tail(log_p: Tensor) -> Tensor:
    """Log-probs [c, k] of some ids -> [c, k + 1], the last one that of all other ids."""
    inside = log_p.logsumexp(-1, keepdim=True)
    inside = inside.clamp(max=-TAIL_FLOOR)
    tail = inside.expm1()
    tail.neg_()
    tail.log_()
    return torch.cat([log_p, tail], -1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) over the last dimension."""
    weighted = log_a.exp()
    weighted.mul_(log_a - log_b)
    return weighted.sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """Of log-probs [c, C] of policy and teacher: [c]. `beta` as in Divergence."""
    if beta == 0:
        return kl(log_q, log_p)
    if beta == 1:
        return kl(log_p, log_q)
    log_m = mixture(log_p, log_q, beta)
    total = kl(log_q, log_m)
    total.mul_(beta)
    total.add_(kl(log_p, log_m), alpha=1 - beta)
    return total


def divergence_slope(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """d divergence / dz [c, C] for log p = log_softmax z; a fresh tensor."""
    p = log_p.exp()
    if beta == 0:
        return p.sub_(log_q.exp())
    if beta == 1:
        return centred(p, log_p - log_q)
    log_ratio = log_p - mixture(log_p, log_q, beta)
    log_ratio.mul_(1 - beta)
    return centred(p, log_ratio)


def centred(p: Tensor, x: Tensor) -> Tensor:
    """p (x - E_p x), in the place of p; x is overwritten."""
    mean = (p * x).sum(-1, keepdim=True)
    x.sub_(mean)
    return p.mul_(x)


def mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """log(beta q + (1 - beta) p)"""
    teacher = log_q + log(beta)
    policy = log_p + log(1 - beta)
    return torch.logaddexp(teacher, policy)
