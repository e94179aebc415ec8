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

from tandem.engine.core.errors import MethodError
from tandem.engine.model.chunked_head import Gradients, final_logits, logit_slope, parts
from tandem.engine.model.quantities import Chunk, Quantity


@dataclass(frozen=True, eq=False)
class HeadInputs:
    """A model at n tokens: what its logits are computed from.

    hidden [n, H], weight [V, H], bias [V] or None; `scale` and `cap` are the model's own constants,
    see engine/model/heads.py. Its weight must stay whole and unchanged until backward has run.

    `common`, for a model beside the policy: how many ids, from 0 on, mean the same tokens in both.
    The others, such as rows that pad the embedding, are left out and both distributions are
    normalised over the rest. None: all of them, and both vocabularies have one size.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    common: int | None = None

    def logits(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        """[c, V], or [c, common], a fresh tensor."""
        weight, bias = self.weight[: self.common], self.bias
        if bias is not None:
            bias = bias[: self.common]
        return final_logits(
            self.hidden[part], weight, bias, self.temperature, dtype, self.scale, self.cap
        )

    def log_probs(self, part: slice, dtype: torch.dtype) -> torch.Tensor:
        z = self.logits(part, dtype)
        return z.sub_(z.logsumexp(-1, keepdim=True))


def measure(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    quantities: Sequence[Quantity],
    data: Mapping[str, torch.Tensor] | None = None,
    others: Mapping[str, HeadInputs] | None = None,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """The quantities, [n] or [n, k] each, in float32; differentiable in hidden, weight and bias.

    hidden [n, H], weight [V, H], bias [V] or None. `data`: per-token tensors by name, [n] or
    [n, k]. `others`: other models at the same n tokens by name, each with a temperature of its own.
    With n = 0 the results are empty and still attached to the graph.

    Raises MethodError for a quantity whose model or data is not there or does not fit.
    """
    data, others = dict(data or {}), dict(others or {})
    check_inputs(len(hidden), len(weight), quantities, data, others)
    return MeasuredHead.apply(
        hidden, weight, bias, tuple(quantities), data, others, temperature, chunk, scale, cap
    )


def check_inputs(
    tokens: int,
    vocabulary: int,
    quantities: Sequence[Quantity],
    data: Mapping[str, torch.Tensor],
    others: Mapping[str, HeadInputs],
) -> None:
    for quantity in quantities:
        check_given(quantity, "model", quantity.models, others)
        check_given(quantity, "data", quantity.data, data)
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
    if model.common is None and size != vocabulary:
        raise MethodError(
            f"model {name!r} has {size} ids, but the policy has {vocabulary}; if the first ids of "
            "both mean the same tokens, say how many with common"
        )
    if model.common is not None and not 0 < model.common <= min(size, vocabulary):
        raise MethodError(
            f"model {name!r} has common={model.common}, expected 1 to {min(size, vocabulary)}: "
            f"it has {size} ids, the policy {vocabulary}"
        )


class MeasuredHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, quantities, data, others, temperature, chunk, scale, cap
    ):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        policy = HeadInputs(hidden, weight, bias, temperature, scale, cap)
        values, now = [[] for _ in quantities], None
        for part in parts(len(hidden), chunk) or [slice(0, 0)]:
            now = None  # frees the chunk before, so that there is one at a time
            now = make_chunk(policy, part, dtype, quantities, data, others)
            for found, quantity in zip(values, quantities, strict=True):
                found.append(quantity.value(now))
        values = [torch.cat(found) for found in values]
        ctx.save_for_backward(hidden, weight, bias, *values)
        ctx.quantities, ctx.data, ctx.others = quantities, data, others
        ctx.temperature, ctx.chunk, ctx.scale, ctx.cap = temperature, chunk, scale, cap
        ctx.last = now  # backward begins with it
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        hidden, weight, bias, *values = ctx.saved_tensors
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        policy = HeadInputs(hidden, weight, bias, ctx.temperature, ctx.scale, ctx.cap)
        wanted = [
            (quantity, value, grad)
            for quantity, value, grad in zip(ctx.quantities, values, grads, strict=True)
            if grad is not None
        ]
        quantities = [quantity for quantity, _, _ in wanted]
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad, dtype)
        for part in reversed(parts(len(hidden), ctx.chunk)):
            now, ctx.last = ctx.last, None
            if now is None:
                now = make_chunk(policy, part, dtype, quantities, ctx.data, ctx.others)
            d_x = total_slope(now, part, wanted)
            d_x *= logit_slope(now.log_p, now.lse, ctx.temperature, ctx.scale, ctx.cap)
            gradients.add(part, d_x)
            now = d_x = None  # frees them before the next chunk is made
        others = (None,) * 7  # quantities, data, others, temperature, chunk, scale, cap
        return *gradients.of_inputs(), *others


def make_chunk(
    policy: HeadInputs,
    part: slice,
    dtype: torch.dtype,
    quantities: Sequence[Quantity],
    data: Mapping[str, torch.Tensor],
    others: Mapping[str, HeadInputs],
) -> Chunk:
    """The tokens of `part`, with the log-probs of those models only that `quantities` read."""
    z = policy.logits(part, dtype)
    lse = z.logsumexp(-1, keepdim=True)
    models = {name for quantity in quantities for name in quantity.models}
    return Chunk(
        z.sub_(lse),
        lse,
        {name: others[name].log_probs(part, dtype) for name in sorted(models)},
        {name: tensor[part] for name, tensor in data.items()},
    )


def total_slope(
    chunk: Chunk, part: slice, wanted: Sequence[tuple[Quantity, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """d sum(grad * value) / dz [c, V] of all (quantity, values, grads) that are wanted."""
    total = None
    for quantity, value, grad in wanted:
        slope = quantity.slope(chunk, value[part], grad[part])
        total = slope if total is None else total.add_(slope)
    return torch.zeros_like(chunk.log_p) if total is None else total


@torch.no_grad()
def top_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    k: int,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [n, k], log-probs float32 [n, k]) of the k most likely tokens, the likeliest
    first. Nothing is differentiable.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    model = HeadInputs(hidden, weight, bias, temperature, scale, cap)
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int64)
    logp = hidden.new_empty(len(hidden), k, dtype=dtype)
    for part in parts(len(hidden), chunk):
        logp[part], ids[part] = model.log_probs(part, dtype).topk(k)
    return ids, logp


@torch.no_grad()
def drawn_tokens(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    uniform: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
        sums = log_p.exp().cumsum_(-1)
        points = uniform[part].to(dtype) * sums[:, -1:]
        found = torch.searchsorted(sums, points, right=True)
        ids[part] = found.clamp_(max=log_p.shape[-1] - 1)
        logp[part] = log_p.gather(-1, ids[part])
    return ids, logp
