"""LoRA (Hu et al., arXiv 2106.09685) by peft: y = W x + s B A x with W frozen and s = alpha / rank.

peft puts a layer of its own around each linear layer, so that the model's parameters get other
names. Whoever needs them as the checkpoint has them (rollout engines, export) asks `hf_tensors`,
which gives W + s B A under W's own name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tandem.engine.config.scope import ScopeConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tandem.engine.model.policy import Policy

NAME = "default"  # of the one adapter, as peft has it
BASE = ".base_layer."  # between a layer's name and its weight's, once peft is around it


def is_linear(module: nn.Module) -> bool:
    """What can get an adapter; Conv1D is GPT-2's linear layer, with the weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def add_adapters(
    model: PreTrainedModel, names: Sequence[str], scope: ScopeConfig, seed: int
) -> dict[str, Any]:
    """Put an adapter around each of the layers, the same on all ranks and zero at the start
    (B = 0); nothing else of the model trains. {name of the layer: peft's layer}
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(peft_config(names, scope), model)
    generator = torch.Generator().manual_seed(seed)
    adapters: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    for layer in adapters.values():
        nn.init.kaiming_uniform_(
            layer.lora_A[NAME].weight, a=math.sqrt(5), generator=generator
        )  # as peft and the paper's code
        if scope.dropout:
            layer.lora_dropout[NAME] = TrainingDropout(scope.dropout)
    return adapters


def peft_config(names: Sequence[str], scope: ScopeConfig):
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(names),
        r=scope.rank,
        lora_alpha=scope.alpha,  # type: ignore[arg-type]  # a float will do
        lora_dropout=scope.dropout,
        use_rslora=scope.rslora,
    )


class TrainingDropout(nn.Module):
    """Dropout where a gradient is asked for: modules of a policy stay in eval mode."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.share, training=torch.is_grad_enabled())


@contextmanager
def switched_off(policy: Policy) -> Iterator[None]:
    """The policy as it was before training: W alone."""
    try:
        for layer in policy.adapters.values():
            layer.enable_adapters(False)
        yield
    finally:
        for layer in policy.adapters.values():
            layer.enable_adapters(True)


@dataclass(frozen=True, eq=False)
class HfTensor:
    """A tensor of the Hugging Face checkpoint, and the parameters that make it. The first has its
    shape and dtype.
    """

    name: str
    parameters: tuple[nn.Parameter, ...]
    layer: Any = None  # peft's, where an adapter is added to the first

    def value(self) -> Tensor:
        """Once ZeRO-3 has gathered the parameters: the first itself, or W + s B A, computed in
        float32.
        """
        weight = self.parameters[0].detach()
        if self.layer is None:
            return weight
        a, b = (parameter.detach().float() for parameter in self.parameters[1:])
        delta = self.layer.scaling[NAME] * (b @ a)
        if self.layer.fan_in_fan_out:
            delta = delta.T
        return (weight.float() + delta).to(weight.dtype)


def hf_tensors(policy: Policy) -> Iterator[HfTensor]:
    """All of the model's, with the adapters added; tied weights once."""
    adapted = {f"{name}.weight": layer for name, layer in policy.adapters.items()}
    for own_name, parameter in policy.model.named_parameters():
        name = plain_name(own_name)
        layer = adapted.get(name)
        if layer is not None:
            a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            yield HfTensor(name, (parameter, a, b), layer)
        elif ".lora_" not in name:
            yield HfTensor(name, (parameter,))


def adapter_tensors(policy: Policy) -> Iterator[HfTensor]:
    """A and B of every adapter, with the names of peft's files."""
    for name, layer in policy.adapters.items():
        for part in ("lora_A", "lora_B"):
            yield HfTensor(
                f"base_model.model.{name}.{part}.weight", (getattr(layer, part)[NAME].weight,)
            )


def plain_name(name: str) -> str:
    """A parameter's name as the checkpoint has it."""
    return name.replace(BASE, ".")


def write_adapter(
    folder: Path, tensors: dict[str, Tensor], policy: Policy, scope: ScopeConfig, base: str
) -> None:
    """The folder that peft's `PeftModel.from_pretrained(model, folder)` reads."""
    from safetensors.torch import save_file

    config = peft_config(list(policy.adapters), scope)
    config.base_model_name_or_path = base
    config.inference_mode = True
    config.fan_in_fan_out = any(layer.fan_in_fan_out for layer in policy.adapters.values())
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
