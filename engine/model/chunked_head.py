"""The head: log-probs and entropies of tokens from hidden states, with the logits of at most
`chunk` tokens in memory at a time.

For z = f(h W^T + b) / T, logp = z[target] - lse(z) and H = lse(z) - sum p z, both in float32
(float64 for float64 input). f is what the model does to its logits: f(x) = s x with a constant
scale s, or f(x) = c tanh(s x / c) with a soft cap c; the temperature T comes after it, as in vLLM
and transformers. Backward computes the logits of each chunk again and uses
    d logp / d z = onehot(target) - p      dH / dz = -p (log p + H)      f'(x) = s (1 - (f(x)/c)^2)
so that a tensor of shape [tokens, vocabulary] exists neither forward nor backward. Backward begins
with the chunk that forward ended with, which is kept: up to `chunk` tokens nothing is computed
twice, beyond that the price is one more matmul h W^T per token. Figures: docs/performance.md.

The matmuls run in the dtype of `hidden` and `weight`. In bfloat16 the logits are therefore rounded
to 8 bits before the float32 softmax, as they are in vLLM and in transformers; a GPU returns the
float32 accumulator instead, at no cost. The weight gradient is summed over chunks in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """log p(target) and, if asked for, the entropy of the whole distribution at temperature
    `temperature`.

    `scale` and `cap` are the model's own constants: logits are multiplied by `scale`, then kept
    within (-cap, cap) by a tanh.

    hidden [n, H], weight [V, H], bias [V] or None, target int64 [n] -> (logp [n], entropy [n] or
    None), float32. Both are differentiable in hidden, weight and bias. With n = 0 the result is
    empty and still attached to the graph.
    """
    return ChunkedHead.apply(hidden, weight, bias, target, temperature, chunk, entropy, scale, cap)


class ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, chunk, entropy, scale, cap):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logp = hidden.new_empty(len(hidden), dtype=dtype)
        lse = torch.empty_like(logp)
        ent = torch.empty_like(logp) if entropy else None
        for part in parts(len(hidden), chunk):
            z = final_logits(hidden[part], weight, bias, temperature, dtype, scale, cap)
            lse_here = z.logsumexp(-1)
            lse[part] = lse_here
            of_target = z.gather(-1, target[part, None])
            of_target = of_target.squeeze(-1)
            logp[part] = of_target - lse_here
            log_p = z.sub_(lse_here[:, None])
            if ent is not None:
                ent[part] = entropy_of(log_p)
        ctx.save_for_backward(hidden, weight, bias, target, lse, ent)
        ctx.last = log_p if len(hidden) else None
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.scale = scale
        ctx.cap = cap
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, target, lse, ent = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(lse)
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad, lse.dtype)
        for part in reversed(parts(len(hidden), ctx.chunk)):
            lse_here = lse[part, None]
            if part.stop == len(hidden) and ctx.last is not None:
                log_p = ctx.last
                ctx.last = None  # overwritten below, so it serves once
            else:
                log_p = final_logits(
                    hidden[part], weight, bias, ctx.temperature, lse.dtype, ctx.scale, ctx.cap
                )
                log_p.sub_(lse_here)
            factor = logit_slope(log_p, lse_here, ctx.temperature, ctx.scale, ctx.cap)
            grad_here = grad_logp[part, None]
            slope = grad_here
            if grad_entropy is not None:
                slope = log_p + ent[part, None]
                slope.mul_(grad_entropy[part, None])
                slope.add_(grad_here)
            d_z = log_p.exp_()
            d_z.mul_(slope)
            d_z.neg_()
            d_z.scatter_add_(-1, target[part, None], grad_here)
            d_z.mul_(factor)
            gradients.add(part, d_z)
        others = (None,) * 6  # target, temperature, chunk, entropy, scale, cap
        return *gradients.of_inputs(), *others


class Gradients:
    """Gradients of hidden, weight and bias, as far as they are needed, added up chunk by chunk."""

    def __init__(self, hidden, weight, bias, needed, dtype: torch.dtype):
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.d_hidden = torch.zeros_like(hidden) if needed[0] else None
        self.d_weight = torch.zeros_like(weight, dtype=dtype) if needed[1] else None
        self.d_bias = torch.zeros_like(bias, dtype=dtype) if needed[2] else None

    def add(self, part: slice, d_x: Tensor) -> None:
        """d_x [c, V]: the gradient of x = h W^T + b for the tokens of `part`."""
        if self.d_bias is not None:
            self.d_bias += d_x.sum(0)
        d_x = d_x.to(self.hidden.dtype)
        if self.d_hidden is not None:
            self.d_hidden[part] = d_x @ self.weight
        if self.d_weight is not None and self.d_weight.dtype == d_x.dtype:
            self.d_weight.addmm_(d_x.T, self.hidden[part])
        elif self.d_weight is not None:
            self.d_weight += d_x.T @ self.hidden[part]

    def of_inputs(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(d hidden, d weight, d bias) in the dtypes of hidden, weight and bias."""
        d_weight = self.d_weight
        if d_weight is not None:
            d_weight = d_weight.to(self.weight.dtype)
        d_bias = self.d_bias
        if d_bias is not None:
            d_bias = d_bias.to(self.bias.dtype)
        return self.d_hidden, d_weight, d_bias


def parts(n: int, chunk: int) -> list[slice]:
    found = []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        found.append(slice(start, stop))
    return found


def entropy_of(log_p: Tensor) -> Tensor:
    """[chunk] from log-probs [chunk, V]."""
    p_log_p = log_p.exp()
    p_log_p.mul_(log_p)
    return -p_log_p.sum(-1)


def final_logits(
    hidden,
    weight,
    bias,
    temperature: float,
    dtype: torch.dtype,
    scale: float,
    cap: float | None,
) -> Tensor:
    """[chunk, V] in dtype `dtype`, a fresh tensor that the caller may overwrite."""
    if hidden.is_cuda and hidden.dtype != dtype:
        z = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        z = (hidden @ weight.T).to(dtype)
    if bias is not None:
        z += bias
    if cap is None:
        return z.mul_(scale / temperature)
    z.mul_(scale / cap)
    z.tanh_()
    return z.mul_(cap / temperature)


def logit_slope(
    log_p: Tensor,
    lse: Tensor,
    temperature: float,
    scale: float,
    cap: float | None,
) -> Tensor | float:
    """dz / dx at the logits z that gave `log_p` [chunk, V]; lse [chunk, 1].

    With a cap a fresh tensor: 1 - tanh^2 of the capped logits is a part of it.
    """
    factor = scale / temperature
    if cap is None:
        return factor
    slope = log_p + lse
    slope.mul_(temperature / cap)  # the tanh
    slope.square_()
    slope.neg_()
    slope.add_(1.0)
    return slope.mul_(factor)
