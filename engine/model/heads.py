"""What a policy reads from its hidden states: log-probs of tokens (`Head`) and values of states
(`ValueHead`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tandem.engine.core.errors import ConfigError
from tandem.engine.model.chunked_head import token_logprobs


def logit_map(text_config) -> tuple[float, float | None]:
    """(scale, cap): what the model does to its logits before the softmax, see
    engine/model/chunked_head.py.

    From the names that model families have for it; `self_check` catches what has no known name.
    """
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= number(text_config, name) or 1.0
    scaling = number(text_config, "logits_scaling") or 1.0
    if text_config.model_type == "hyperclovax":
        scale *= scaling
    else:
        scale /= scaling  # Granite, MiniCPM3
    cap = number(text_config, "final_logit_softcapping")  # Gemma
    return scale, cap or None


def number(text_config, name: str) -> float | None:
    """A numeric setting; None where the config lacks it or has something else there."""
    value = getattr(text_config, name, None)
    return float(value) if isinstance(value, int | float) else None


class Head(nn.Module):
    """The chunked head as a module with the output embedding's own parameters (not copies): ZeRO-3
    gathers parameters per module call.
    """

    def __init__(self, output: nn.Module | None, scale: float = 1.0, cap: float | None = None):
        super().__init__()
        if type(output) is not nn.Linear:
            raise ConfigError(
                f"the model's output embedding is {type(output).__name__}, expected "
                "torch.nn.Linear; this model is not supported"
            )
        self.weight, self.bias = output.weight, output.bias
        self.scale, self.cap = scale, cap

    def forward(
        self,
        hidden,
        target=None,
        temperature: float = 1.0,
        chunk: int = 1024,
        entropy: bool = False,
        ask: Callable | None = None,
    ):
        """See token_logprobs; without a target the most likely tokens, int64 [n].

        `ask` gets the head's parameters instead and gives the result: a function of
        engine/model/measured_head.py whose other arguments are bound, e.g.
        `partial(measure, quantities=[Entropy()])` or `partial(top_tokens, k=20)`. To be called in
        here, where ZeRO-3 has gathered the parameters.
        """
        if ask is not None:
            return ask(
                hidden,
                self.weight,
                self.bias,
                temperature=temperature,
                chunk=chunk,
                scale=self.scale,
                cap=self.cap,
            )
        if target is None:  # a scale or a cap does not change which logit is the largest
            likely = []
            for part in hidden.split(chunk):
                logits = nn.functional.linear(part, self.weight, self.bias)
                likely.append(logits.argmax(-1))
            return torch.cat(likely)
        return token_logprobs(
            hidden,
            self.weight,
            self.bias,
            target,
            temperature,
            chunk,
            entropy,
            self.scale,
            self.cap,
        )


class ValueHead(nn.Module):
    """V = w . hidden + b in float32, on the policy's own trunk.

    Zero at the start, so that the first advantages are sums of rewards.

    With `embedding` dimensions V = w . relu(u) + b with u = W hidden (CARFT); W is the same on all
    ranks.
    """

    def __init__(self, output: Tensor, embedding: int = 0):
        super().__init__()
        size = output.shape[1]
        self.embedding = None
        if embedding:
            generator = torch.Generator().manual_seed(0)
            draw = torch.randn(embedding, size, generator=generator) / size**0.5
            self.embedding = nn.Parameter(draw.to(output))
        self.weight = nn.Parameter(output.new_zeros(embedding or size))
        self.bias = nn.Parameter(output.new_zeros(1))

    def forward(self, hidden, embed: bool = False):
        """value [n], and with `embed` u [n, embedding]; float32."""
        u = features = hidden.float()
        if self.embedding is not None:
            u = u @ self.embedding.float().T
            features = u.relu()
        value = features @ self.weight.float() + self.bias.float()
        return (value, u) if embed else value
