"""The head asked for more than a log-prob and an entropy: quantities of the full distribution, the
most likely tokens, drawn tokens. As in engine/model/chunked_head.py the logits of at most `chunk`
tokens are in memory, in the same precision and with the same scale, cap and temperature.

`measure` makes the logits of a chunk once for all quantities that are asked for, forward and
backward, and those of other models beside them. Each quantity writes its gradient with respect to
the policy's logits by hand (engine/model/quantities.py); other models get none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.engine.core.errors import MethodError
from tandem.engine.model.chunked_head import Gradients, final_logits, logit_slope, parts
from tandem.engine.model.quantities import (
    Chunk,
    LogProbs,
    Quantity,
    TopKDivergence,
    whole_ids,
)


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """A model at n tokens: what its logits are computed from.

    hidden [n, H], weight [V, H], bias [V] or None; `scale` and `cap` are the model's own constants,
    see engine/model/heads.py. Its weight must stay whole and unchanged until backward has run.

    `common`, for a model beside the policy: how many ids, from 0 on, mean the same tokens in both.
    The others, such as rows that pad the embedding, are left out and both distributions are
    normalised over the rest. None: all of them, and both vocabularies have one size.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    temperature: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    common: int | None = None

    def logits(self, part: slice, dtype: torch.dtype) -> Tensor:
        """[c, V], or [c, common], a fresh tensor."""
        hidden = self.hidden[part]
        weight = self.weight[: self.common]
        bias = self.bias
        if bias is not None:
            bias = bias[: self.common]
        return final_logits(hidden, weight, bias, self.temperature, dtype, self.scale, self.cap)

    def log_probs(self, part: slice, dtype: torch.dtype) -> Tensor:
        z = self.logits(part, dtype)
        lse = z.logsumexp(-1, keepdim=True)
        return z.sub_(lse)


def measure(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    quantities: Sequence[Quantity],
    data: Mapping[str, Tensor] | None = None,
    others: Mapping[str, HeadInputs] | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, ...]:
    """The quantities, [n] or [n, k] each, in float32; differentiable in hidden, weight and bias.

    hidden [n, H], weight [V, H], bias [V] or None. `data`: per-token tensors by name, [n] or
    [n, k]. `others`: other models at the same n tokens by name, each with a temperature of its own.
    With n = 0 the results are empty and still attached to the graph.

    Raises MethodError for a quantity whose model or data is not there or does not fit.
    """
    data = dict(data or {})
    others = dict(others or {})
    for quantity in quantities:
        if isinstance(quantity, (LogProbs, TopKDivergence)) and quantity.ids in data:
            data[quantity.ids] = whole_ids(quantity.ids, data[quantity.ids], len(weight))
    check_inputs(len(hidden), len(weight), quantities, data, others)
    return MeasuredHead.apply(
        hidden, weight, bias, tuple(quantities), data, others, temperature, chunk, scale, cap
    )


def check_inputs(
    tokens: int,
    vocabulary: int,
    quantities: Sequence[Quantity],
    data: Mapping[str, Tensor],
    others: Mapping[str, HeadInputs],
) -> None:
    for quantity in quantities:
        check_given(quantity, "model", quantity.models, others)
        check_given(quantity, "data", quantity.data, data)
        if isinstance(quantity, TopKDivergence):
            check_top(quantity, data)
    lengths = {name: len(tensor) for name, tensor in data.items()}
    lengths |= {name: len(model.hidden) for name, model in others.items()}
    for name, length in lengths.items():
        if length != tokens:
            raise MethodError(f"{name!r} has {length} tokens, but the policy has {tokens}")
    for name, model in others.items():
        check_vocabulary(name, model, vocabulary)


def check_given(quantity: Quantity, kind: str, needed: Sequence[str], given: Collection[str]):
    for name in needed:
        if name not in given:
            names = ", ".join(sorted(given)) or "none"
            raise MethodError(f"{quantity} needs {kind} {name!r}; given: {names}")


def check_vocabulary(name: str, model: HeadInputs, vocabulary: int) -> None:
    size = len(model.weight)
    if model.common is None:
        if size != vocabulary:
            raise MethodError(
                f"model {name!r} has {size} ids, but the policy has {vocabulary}; if the first ids "
                "of both mean the same tokens, say how many with common"
            )
        return
    most = min(size, vocabulary)
    if not 0 < model.common <= most:
        raise MethodError(
            f"model {name!r} has common={model.common}, expected 1 to {most}: it has {size} ids, "
            f"the policy {vocabulary}"
        )


def check_top(quantity: TopKDivergence, data: Mapping[str, Tensor]) -> None:
    ids = data[quantity.ids]
    logp = data[quantity.logp]
    if ids.dim() != 2 or ids.shape != logp.shape:
        raise MethodError(
            f"{quantity}: {quantity.ids!r} has shape {list(ids.shape)} and {quantity.logp!r} "
            f"{list(logp.shape)}, expected [tokens, k] of both; streams of rows, one number per "
            "token, cannot be that"
        )


class MeasuredHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, quantities, data, others, temperature, chunk, scale, cap
    ):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        policy = HeadInputs(hidden, weight, bias, temperature, scale, cap)
        pieces = [[] for _ in quantities]  # of each, the values of chunk after chunk
        now = None
        for part in parts(len(hidden), chunk) or [slice(0, 0)]:
            now = None  # frees the chunk before, so that there is one at a time
            now = make_chunk(policy, part, dtype, quantities, data, others)
            for mine, quantity in zip(pieces, quantities, strict=True):
                value = quantity.value(now)
                mine.append(value)
        values = [torch.cat(mine) for mine in pieces]
        ctx.save_for_backward(hidden, weight, bias, *values)
        ctx.quantities = quantities
        ctx.data = data
        ctx.others = others
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.scale = scale
        ctx.cap = cap
        ctx.last = now  # backward begins with it
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias, *values = ctx.saved_tensors
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        policy = HeadInputs(hidden, weight, bias, ctx.temperature, ctx.scale, ctx.cap)
        wanted = []
        for quantity, value, grad in zip(ctx.quantities, values, grads, strict=True):
            if grad is not None:
                wanted.append(Wanted(quantity, value, grad))
        quantities = [one.quantity for one in wanted]
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad, dtype)
        for part in reversed(parts(len(hidden), ctx.chunk)):
            now = ctx.last
            ctx.last = None
            if now is None:
                now = make_chunk(policy, part, dtype, quantities, ctx.data, ctx.others)
            d_x = total_slope(now, part, wanted)
            d_x *= logit_slope(now.log_p, now.lse, ctx.temperature, ctx.scale, ctx.cap)
            gradients.add(part, d_x)
            del now, d_x  # frees them before the next chunk is made
        others = (None,) * 7  # quantities, data, others, temperature, chunk, scale, cap
        return *gradients.of_inputs(), *others


@dataclass(frozen=True, eq=False)
class Wanted:
    """A quantity that backward goes through: its values at all tokens, and their gradients."""

    quantity: Quantity
    values: Tensor  # [n] or [n, k]
    grads: Tensor


def make_chunk(
    policy: HeadInputs,
    part: slice,
    dtype: torch.dtype,
    quantities: Sequence[Quantity],
    data: Mapping[str, Tensor],
    others: Mapping[str, HeadInputs],
) -> Chunk:
    """The tokens of `part`, with the log-probs of those models only that `quantities` read."""
    z = policy.logits(part, dtype)
    lse = z.logsumexp(-1, keepdim=True)
    log_p = z.sub_(lse)
    models: set[str] = set()
    for quantity in quantities:
        models.update(quantity.models)
    log_probs = {name: others[name].log_probs(part, dtype) for name in sorted(models)}
    data_here = {name: tensor[part] for name, tensor in data.items()}
    return Chunk(log_p, lse, log_probs, data_here)


def total_slope(chunk: Chunk, part: slice, wanted: Sequence[Wanted]) -> Tensor:
    """d sum(grad * value) / dz [c, V] of all that is wanted."""
    total = None
    for one in wanted:
        slope = one.quantity.slope(chunk, one.values[part], one.grads[part])
        if total is None:
            total = slope
        else:
            total.add_(slope)
    if total is None:
        return torch.zeros_like(chunk.log_p)
    return total


@torch.no_grad()
def top_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    k: int,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids int64 [n, k], log-probs float32 [n, k]) of the k most likely tokens, the likeliest
    first. Nothing is differentiable.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    model = HeadInputs(hidden, weight, bias, temperature, scale, cap)
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int64)
    logp = hidden.new_empty(len(hidden), k, dtype=dtype)
    for part in parts(len(hidden), chunk):
        top = model.log_probs(part, dtype).topk(k)
        logp[part] = top.values
        ids[part] = top.indices
    return ids, logp


@torch.no_grad()
def drawn_tokens(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    uniform: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids int64 [n, k], log-probs float32 [n, k]) of tokens drawn with replacement from the full
    distribution. Nothing is differentiable; LogProbs gives log-probs at these ids that are.

    `uniform` [n, k], numbers in [0, 1): each becomes the first id at which the sum of the
    probabilities up to it is larger. The caller draws them, so that a token gets the same ids in
    any micro-batch.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    model = HeadInputs(hidden, weight, bias, temperature, scale, cap)
    ids = torch.empty_like(uniform, dtype=torch.int64)
    logp = torch.empty_like(uniform, dtype=dtype)
    for part in parts(len(hidden), chunk):
        log_p = model.log_probs(part, dtype)
        sums = log_p.exp()
        sums.cumsum_(-1)
        total = sums[:, -1:]
        points = uniform[part].to(dtype) * total
        found = torch.searchsorted(sums, points, right=True)
        last_id = log_p.shape[-1] - 1
        found.clamp_(max=last_id)
        ids[part] = found
        logp[part] = log_p.gather(-1, found)
    return ids, logp
