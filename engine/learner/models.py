"""The models beside the policy of one rank: frozen ones, moving averages of the policy, and the
policy as it is. None of them is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tandem.engine.config.names import POLICY, REFERENCE
from tandem.engine.config.other_models import OtherModelConfig
from tandem.engine.config.schema import Config
from tandem.engine.core.errors import ConfigError, MethodError
from tandem.engine.learner.protocol import PolicySpec, TrainEngine
from tandem.engine.model.adapters import switched_off
from tandem.engine.model.context import engine_length
from tandem.engine.model.load import load_policy
from tandem.engine.model.measured_head import HeadInputs
from tandem.engine.model.policy import Policy, hf_parameters
from tandem.engine.model.rope import follow_engines
from tandem.engine.model.view import View

# in a checkpoint: the reference, where it is not the run's original model, and averages
REFERENCE_FILE = "reference.safetensors"
AVERAGE_FILE = "average_{}.safetensors"
ORIGINAL = ""  # in the place of a name: the run's original model, which several names share


def load_like_engines(config: Config, model_path: str, spec: PolicySpec) -> Policy:
    """The model as it is in the folder, computing as the engines of this run do."""
    policy = load_policy(replace(config.model, path=model_path))
    if spec.uses_rollouts:
        follow_engines(policy.model, engine_length(config))
    return policy


def vocabulary(policy: Policy) -> int:
    """Rows of its embedding, also where ZeRO-3 has split it."""
    model: Any = policy.model  # transformers' own types say nothing of it
    return model.get_input_embeddings().num_embeddings


@contextmanager
def on_device(policy: Policy, device: torch.device) -> Iterator[None]:
    """A frozen model that may wait in CPU memory is on the device; what is copied there goes when
    nobody reads it any more. Not run on a GPU.
    """
    tensors = [*policy.parameters(), *policy.buffers()]
    waiting = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, waiting, strict=True):
            tensor.data = data


class OtherModels:
    """By name: `reference` and `policy`, which are always there, and those of the config.

    `model_path` is the run's original model, also after a resume; it is loaded when first asked
    for. With LoRA it is the policy itself with its adapters switched off, and no second model; only
    quantities beside it need one where ZeRO-3 splits the weights.

    `set_reference` makes the present weights the reference instead; they are then a model of their
    own in any case. Those, and averages of the policy, are part of every checkpoint.
    """

    def __init__(self, config: Config, model_path: str, spec: PolicySpec, engine: TrainEngine):
        self.config = config
        self.model_path = model_path
        self.spec = spec
        self.engine = engine
        always = {
            REFERENCE: OtherModelConfig(kind="initial"),
            POLICY: OtherModelConfig(kind="policy"),
        }
        self.sources: Mapping[str, OtherModelConfig] = {**always, **config.models}
        self.reference_replaced = False  # the reference is not the run's original model
        self.loaded: dict[str, Policy] = {}
        # {name: {parameter: its average in float32}}
        self.averages: dict[str, dict[str, Tensor]] = {}
        for name, source in config.models.items():
            if source.kind == "path":
                self.weights_of(name)
            if source.kind == "ema":
                parameters = hf_parameters(self.weights_of(name))
                self.averages[name] = {key: value.float() for key, value in parameters}

    # -- asked about tokens

    @contextmanager
    def scored_by(self, name: str) -> Iterator[Callable[..., Mapping[str, Tensor]]]:
        """Policy.forward of a model."""
        if self.sources[name].kind == "policy":
            yield self.engine.forward
        elif self.is_policy_without_adapters(name):
            with switched_off(self.engine.module):
                yield self.engine.forward
        else:
            policy = self.weights_of(name)
            with on_device(policy, self.engine.device):
                yield policy

    def beside(self, name: str, view: View) -> HeadInputs:
        """A model at the tokens of the view, for quantities that compare the policy with it."""
        policy = self.engine.module
        split = self.engine.splits_weights
        if self.is_policy_without_adapters(name) and not split:
            with switched_off(policy):
                return policy.beside(view)
        if self.sources[name].kind == "policy":
            if split:
                raise MethodError(
                    f"a quantity compares the policy with itself (the model {name!r}), which "
                    "learner.zero_stage 3 has in parts; use stage 2 or less, or a model of kind ema"
                )
            return policy.beside(view)
        other = self.weights_of(name)
        sizes = vocabulary(other), vocabulary(policy)
        common = None
        if sizes[0] != sizes[1]:
            common = min(sizes)  # what is beyond pads an embedding: engine/model/same_tokens.py
        with on_device(other, self.engine.device):
            found = other.beside(view)
            # of their own: they are read until backward has run, wherever the model is then
            bias = None if found.bias is None else found.bias.detach()
            return replace(found, weight=found.weight.detach(), bias=bias, common=common)

    def is_policy_without_adapters(self, name: str) -> bool:
        return bool(self.engine.module.adapters) and self.key_of(name) == ORIGINAL

    def key_of(self, name: str) -> str:
        """Which of the loaded models it is."""
        replaced = name == REFERENCE and self.reference_replaced
        return ORIGINAL if self.sources[name].kind == "initial" and not replaced else name

    def weights_of(self, name: str) -> Policy:
        key = self.key_of(name)
        if key not in self.loaded:
            path = self.sources[name].path or self.model_path
            policy = load_like_engines(self.config, path, self.spec)
            if not self.config.learner.offload_models:
                policy = policy.to(self.engine.device)
            self.loaded[key] = policy.requires_grad_(False)
        return self.loaded[key]

    # -- as the policy changes

    @torch.no_grad()
    def set_reference(self) -> None:
        """Make the present weights the reference from now on. A collective."""
        self.replace_reference()
        frozen = dict(hf_parameters(self.weights_of(REFERENCE)))
        for name, tensor in self.engine.full_parameters():
            frozen[name].copy_(tensor)

    def replace_reference(self) -> None:
        """Give the reference weights of its own."""
        shared = any(source.kind == "initial" for source in self.config.models.values())
        if not self.reference_replaced and not shared and ORIGINAL in self.loaded:
            self.loaded[REFERENCE] = self.loaded.pop(ORIGINAL)
        self.reference_replaced = True

    @torch.no_grad()
    def follow_policy(self) -> None:
        """Move the averages, after an optimizer step that was applied. A collective."""
        if not self.averages:
            return
        for key, tensor in self.engine.full_parameters():
            for name, average in self.averages.items():
                mine = average[key]
                mine.lerp_(tensor.to(mine), self.sources[name].rate)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Give the averages to the models that compute with them."""
        for name, average in self.averages.items():
            for key, parameter in hf_parameters(self.weights_of(name)):
                parameter.copy_(average[key])

    # -- checkpoints

    def save(self, folder: Path) -> None:
        """On one rank: all have the same."""
        from safetensors.torch import save_file

        files: dict[str, Mapping[str, Tensor]] = {}
        if self.reference_replaced:
            files[REFERENCE_FILE] = dict(hf_parameters(self.weights_of(REFERENCE)))
        for name, average in self.averages.items():
            files[AVERAGE_FILE.format(name)] = average
        for file, tensors in files.items():
            on_host = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
            save_file(on_host, folder / file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Raises ConfigError if the checkpoint lacks an average."""
        from safetensors.torch import load_file

        if (folder / REFERENCE_FILE).is_file():
            self.replace_reference()
            saved = load_file(folder / REFERENCE_FILE)
            for key, parameter in hf_parameters(self.weights_of(REFERENCE)):
                parameter.copy_(saved[key])
        else:
            self.reference_replaced = False
            self.loaded.pop(REFERENCE, None)
        for name, average in self.averages.items():
            file = folder / AVERAGE_FILE.format(name)
            if not file.is_file():
                raise ConfigError(
                    f"checkpoint {folder} has no {file.name}, the average that models.{name} is; "
                    "resume with the models that the run was started with, or start a new one"
                )
            for key, tensor in load_file(file).items():
                average[key].copy_(tensor)
        self.refresh()
