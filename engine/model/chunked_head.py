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


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 1024,
    entropy: bool = False,
    scale: float = 1.0,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
            lse[part] = z.logsumexp(-1)
            logp[part] = z.gather(-1, target[part, None]).squeeze(-1) - lse[part]
            log_p = z.sub_(lse[part, None])
            if ent is not None:
                ent[part] = -(log_p.exp().mul_(log_p)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target, lse, ent)
        ctx.last = log_p if len(hidden) else None
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.scale, ctx.cap = scale, cap
        ctx.set_materialize_grads(False)
        return logp, ent

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, bias, target, lse, ent = ctx.saved_tensors
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
        d_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[2] else None
        for part in reversed(parts(len(hidden), ctx.chunk)):
            if part.stop == len(hidden) and ctx.last is not None:
                log_p, ctx.last = ctx.last, None  # overwritten below, so it serves once
            else:
                log_p = final_logits(
                    hidden[part], weight, bias, ctx.temperature, lse.dtype, ctx.scale, ctx.cap
                ).sub_(lse[part, None])
            factor = ctx.scale / ctx.temperature  # dz / dx, here without the cap's part
            if ctx.cap is not None:
                factor = cap_slope(log_p, lse[part, None], ctx.temperature, ctx.cap).mul_(factor)
            slope = grad_logp[part, None]
            if grad_entropy is not None:
                slope = (log_p + ent[part, None]).mul_(grad_entropy[part, None]).add_(slope)
            d_z = log_p.exp_().mul_(slope).neg_()
            d_z.scatter_add_(-1, target[part, None], grad_logp[part, None])
            d_z.mul_(factor)
            if d_bias is not None:
                d_bias += d_z.sum(0)
            d_z = d_z.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[part] = d_z @ weight
            if d_weight is not None and d_weight.dtype == d_z.dtype:
                d_weight.addmm_(d_z.T, hidden[part])
            elif d_weight is not None:
                d_weight += d_z.T @ hidden[part]
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        others = (None,) * 6  # target, temperature, chunk, entropy, scale, cap
        return d_hidden, d_weight, d_bias, *others


def parts(n: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, n)) for start in range(0, n, chunk)]


def final_logits(
    hidden, weight, bias, temperature: float, dtype: torch.dtype, scale: float, cap: float | None
) -> torch.Tensor:
    """[chunk, V] in dtype `dtype`, a fresh tensor that the caller may overwrite."""
    if hidden.is_cuda and hidden.dtype != dtype:
        z = torch.mm(hidden, weight.T, out_dtype=dtype)
    else:
        z = (hidden @ weight.T).to(dtype)
    if bias is not None:
        z += bias
    if cap is None:
        return z.mul_(scale / temperature)
    return z.mul_(scale / cap).tanh_().mul_(cap / temperature)


def cap_slope(
    log_p: torch.Tensor, lse: torch.Tensor, temperature: float, cap: float
) -> torch.Tensor:
    """1 - tanh^2 at the capped logits that gave `log_p` [chunk, V]; lse [chunk, 1].

    A fresh tensor.
    """
    tanh = (log_p + lse).mul_(temperature / cap)
    return tanh.square_().neg_().add_(1.0)
